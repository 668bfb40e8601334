"""Recommending the slow and plain way: every candidate is a row of a data frame that the preprocessor encodes."""

import pandas as pd
import torch

from mtcl_torchrec.data.batch import global_batches, iterate


def rows_of(run, user, context=None, candidates=None, seen=False):
    """A frame with all input columns: one row for each candidate of a user."""
    catalogue, schema = run.catalogue, run.config.data_schema
    about = catalogue.users[catalogue.users[schema.user].astype(str) == str(user)]
    rows = catalogue.items
    if candidates is not None:
        rows = rows.set_index(schema.item, drop=False).loc[list(candidates)]
    if not seen and len(about):
        met = catalogue.seen.loc[catalogue.seen[schema.user] == about[schema.user].iloc[0], schema.item]
        rows = rows[~rows[schema.item].isin(met)]
    rows = rows.reset_index(drop=True)
    for column in catalogue.users.columns:
        rows[column] = pd.Series([about[column].iloc[0] if len(about) else None] * len(rows), index=rows.index)
        if len(about):
            rows[column] = rows[column].astype(catalogue.users[column].dtype)
    for column, usual in catalogue.context.items():
        rows[column] = [(context or {}).get(column, usual)] * len(rows)
    for feature in schema.features:
        if feature.rows_from not in rows:
            rows[feature.rows_from] = None
    return rows


@torch.no_grad()
def recommend(run, user, context=None, candidates=None, k=10, seen=False):
    """Item, score and the tasks' predictions, by the model as it was trained."""
    frame, item = rows_of(run, user, context, candidates, seen), run.config.data_schema.item
    encoded, parts = run.encode(frame), []
    for batch in iterate(encoded, global_batches(len(encoded), 1000)):
        out = run.model(batch.dense_features, batch.sparse_features)
        own = run.model.output.parts(out, batch.sparse_features)
        columns = {t.name: own[t.name] if t.kind == "multiclass" else out[t.name] for t in run.model.tasks}
        parts.append(pd.DataFrame({"score": out["score"].numpy(), **{n: v.numpy() for n, v in columns.items()}}))
    scored = pd.concat(parts, ignore_index=True)
    scored.insert(0, item, frame[item].to_numpy())
    return scored.sort_values("score", ascending=False, kind="stable").head(k).reset_index(drop=True)
