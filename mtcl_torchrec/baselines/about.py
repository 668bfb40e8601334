"""What each baseline is, in a line, in the order of what they know; read without any library."""

ABOUT: dict[str, str] = {
    "popularity": "what an item usually gets",
    "item_knn": "items like those that a user had the event with; implicit",
    "als": "matrix factorisation by least squares; implicit",
    "bpr": "matrix factorisation from pairs; implicit",
    "logistic_regression": "linear in one-hot features, ridge for a number; scikit-learn",
    "trees": "gradient-boosted, on target-encoded features; scikit-learn",
    "single_task": "the run's network once for each task",
    "unweighted": "the run's network, its tasks' losses just added up",
}
