"""The HTTP service, a recommender behind ``POST /recommend`` and ``/score``: ``pip install 'mtcl_torchrec[serve]'``.

A request is read and validated against the model's own schema (`bodies`), waits a moment for others (`batching`), is
scored with them in one forward (`ranking`), and is answered by the model that validated it, whatever newer model takes
over meanwhile (`versions`).  `app` holds the routes, `description` their OpenAPI page, `process` the server's sockets
and signals, `metrics` what Prometheus reads.
"""
