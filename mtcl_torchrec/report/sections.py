"""The sections of a report: from what a run directory holds to pictures, tables and sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from mtcl_torchrec.evaluation.naming import MAIN, glossary, label_of
from mtcl_torchrec.evaluation.segments import QUALITY
from mtcl_torchrec.evaluation.worth import verdict_of
from mtcl_torchrec.report import heat, pictures
from mtcl_torchrec.report.baseline_tables import Qualities, baseline_tables, twins_table
from mtcl_torchrec.report.comparisons import GUESS, Comparison, comparisons, qualities, untuned
from mtcl_torchrec.report.contents import RunContents
from mtcl_torchrec.report.facts import Event, TaskFact, events, influence, task_facts, tried_gaps
from mtcl_torchrec.report.fusion_pictures import bars, dots, pareto_pictures
from mtcl_torchrec.report.fusion_verdict import what_does_fusion, worth_explained, worth_in_a_line
from mtcl_torchrec.report.knowable import knowable_picture, knowable_sentence, knowable_table
from mtcl_torchrec.report.layout import TERMS, Report, Section
from mtcl_torchrec.report.segments import segment_tables
from mtcl_torchrec.report.sharing import do_tasks_help
from mtcl_torchrec.report.studio import Studio
from mtcl_torchrec.report.tables import (
    Table,
    cost_tables,
    event_table,
    origin_table,
    shown_tables,
    task_tables,
    tried_table,
)
from mtcl_torchrec.report.verdict import Answer, in_doubt, is_it_good, orders
from mtcl_torchrec.report.words import listed
from mtcl_torchrec.training.rising import in_words, still_rising

MOST_TASKS = 24  # whose curves are drawn: those that the fused score reads come first
MEASURE = "balance: {surgery: {kind: measure}}"


def build_report(run: RunContents, studio: Studio, say: Callable[[str], None] = lambda doing: None) -> Report:
    """All of the page.

    Args:
        run: see `read_contents`.
        studio: draws the pictures.
        say: is told what is being done.
    """
    say("judging")
    facts, of_events = task_facts(run), events(run)
    compared, of_each = comparisons(run), qualities(run)
    gates, gradients = _balance(run)
    shares, whence = influence(run)
    has_fusion = bool(run.fusion) or bool(of_events)
    ranked = [] if run.fused_anew else of_events  # by the score that counts
    good = is_it_good(facts, compared, ranked, untuned=untuned(run), knowable=knowable_sentence(run))
    answers = [
        in_doubt(_still_rising(run, good), run.doubts),
        sharing_answer(run, compared),
        what_does_fusion(
            shares,
            ranked,
            has_fusion,
            tried_gaps(run)[1],
            str(run.fitted.get("target") or ""),
            [fact.task for fact in facts if orders(fact) is False],
        ),
    ]
    say("drawing")
    return Report(
        run.name,
        _subtitle(run),
        answers,
        [
            _tasks(run, facts),
            *_knowable(run, studio),
            _learning(run, studio),
            _ranking(run, studio),
            _calibration(run, studio),
            _sharing(gates, gradients, twins_table(of_each, compared), studio),
            _fusion(run, studio, of_events, shares, whence, has_fusion),
            _segments(run),
            _baselines(run, studio, of_each, compared),
            Section("cost", "What it cost", tables=cost_tables(run), missing=_cost_missing(run)),
            Section("run", "The run itself", _diagnosis(run), [], [origin_table(run)], code=run.run_yaml),
        ],
        run.missing,
        *_worth(run),
        [*TERMS, *glossary(_measures(run))],
    )


def _worth(run: RunContents) -> tuple[str, str]:
    """What the fused score is worth at the shortest length that leaves a choice, and what that counts."""
    table = run.table
    if table is None or run.fused_anew:
        return "", ""
    found = verdict_of(table, run.lengths)
    if found is None:
        return "", ""
    k = int(found.measure.partition("@")[2])
    choice = (run.evaluation["ranking"].get("fused") or {}).get(f"choice@{k}")
    return worth_in_a_line(found), worth_explained(k, table.values, choice, run.numbers)


def _measures(run: RunContents) -> list[str]:
    """Keys of the metrics that the page shows."""
    of_tasks = [key for of in run.of_tasks.values() for key in of]
    return [*of_tasks, *(key for of in (run.evaluation.get("ranking") or {}).values() for key in of or {})]


def sharing_answer(run: RunContents, compared: Sequence[Comparison] | None = None) -> Answer:
    """Whether the run's tasks help each other.

    Args:
        compared: with baselines; None compares.
    """
    gates, gradients = _balance(run)
    tasks = run.tasks or list(run.of_tasks)
    found = comparisons(run) if compared is None else compared
    return _still_rising(run, do_tasks_help(found, gradients, gates, tasks, untuned(run)))


def _still_rising(run: RunContents, answer: Answer) -> Answer:
    """The answer, after what is not settled yet: where training ended too early, all comparisons are of that moment."""
    rising = still_rising(run.history.get("epochs") or [], run.history.get("best_epoch") or 0)
    if not rising or answer.tone == "unknown":
        return answer
    line = in_words(rising)
    said = f"{line[0].upper()}{line[1:]}: more epochs may change this."
    return replace(answer, sentences=[said, *answer.sentences])


def _balance(run: RunContents) -> tuple[list[dict], list[dict]]:
    balance = run.metrics.get("balance") or {}
    return balance.get("gates") or [], balance.get("gradients") or []


def _subtitle(run: RunContents) -> str:
    epochs, best = run.history.get("epochs") or [], run.history.get("best_epoch") or 0
    kept = f"epoch {best} of {len(epochs)} is kept" if best else "no epoch was evaluated"
    if not run.split:
        return f"Training did not finish; {kept}; the numbers below are of its validation."
    return f"Judged by the {run.split} split, {int(run.evaluation.get('rows') or 0):,} rows; {kept}."


def _diagnosis(run: RunContents) -> list[str]:
    lines = [str(line) for line in run.metrics.get("diagnosis") or []]
    return [f"The diagnosis of its training: {'; '.join(lines)}."] if lines else []


def _drawn(run: RunContents) -> list[str]:
    first = [task for task in run.fused_tasks if task in run.kinds]
    return [*first, *(task for task in run.kinds if task not in first)][:MOST_TASKS]


def _not_drawn(run: RunContents) -> list[str]:
    """Which tasks have no pictures, where there are too many; their numbers are in the tables."""
    rest = [task for task in run.kinds if task not in _drawn(run)]
    return [f"Drawn are {MOST_TASKS} tasks; {listed(rest)} {'is' if len(rest) == 1 else 'are'} not."] if rest else []


def _tasks(run: RunContents, facts: Sequence[TaskFact]) -> Section:
    section = Section(
        "tasks",
        "How well each task is predicted",
        tables=task_tables(facts, str((run.config.get("evaluation") or {}).get("threshold") or "f1")),
    )
    if section.tables:
        section.text.append(
            "AUC 0.5 is guessing, 1 is perfect; GAUC is AUC within one user's rows. NE is log-loss relative to always "
            "predicting the base rate: below 1 is better than that. Calibration, predicted over observed events, is 1 "
            "where probabilities are right on average."
        )
    empty = [fact.task for fact in facts if not fact.metrics.get("count")]
    section.missing += [f"{task} has no label in these rows: there is nothing to judge it by." for task in empty]
    one_class = [
        f.task for f in facts if f.kind == "binary" and f.metrics.get("count") and f.metrics.get("auc") is None
    ]
    section.missing += [f"Of {task}, only one kind of label is in these rows: it has no AUC." for task in one_class]
    if not section.tables:
        section.missing.append("Nothing was evaluated: no epoch of this run has ended.")
    return section


def _knowable(run: RunContents, studio: Studio) -> list[Section]:
    """Of a run on a synthetic world only."""
    table = knowable_table(run)
    if table is None:
        return []
    text = "The data are of a synthetic world, so the true probability of each label is known: nobody predicts better."
    return [Section("knowable", "Of what is knowable", [text], knowable_picture(run, studio), [table])]


def _learning(run: RunContents, studio: Studio) -> Section:
    section, epochs = Section("learning", "How training went"), run.history.get("epochs") or []
    if len(epochs) > 1:
        section.pictures = pictures.learning_curves(studio, run.history, _drawn(run))
    if section.pictures:
        section.text.append("Each task on the validation split after each epoch; the ring is the epoch that is kept.")
        section.missing += _not_drawn(run)
    if not epochs:
        section.missing.append("No epoch was evaluated on validation: there are no learning curves.")
    elif len(epochs) == 1:
        section.missing.append("There was one epoch: a curve needs two.")
    return section


def _ranking(run: RunContents, studio: Studio) -> Section:
    section = Section("curves", "ROC and precision-recall")
    table = run.table
    if table is None:
        section.missing.append("There is no file of predictions for this split, so no curves.")
        return section
    without = []
    for task in _drawn(run):
        if task not in table.predicted_names:
            continue
        if run.kinds[task] != "binary":
            without.append(task)
            continue
        rankings = {"own head": table.predicted(task)}
        if table.score is not None and task in run.fused_tasks:
            rankings["fused score"] = table.score
        if (popular := table.popular_for.get(task)) is not None:
            rankings["popularity"] = popular
        threshold = table.thresholds.get(task)
        drawn = pictures.ranking_curves(studio, task, table.labels(task), rankings, threshold)
        section.pictures += drawn
        if not drawn:
            section.missing.append(f"{task} has only one kind of label in these rows, or none: it has no curves.")
    if section.pictures:
        section.text.append(
            "Above the diagonal is better than guessing; of precision and recall, above the line of the base rate."
            + (" The dot is the threshold that was chosen on validation." if table.thresholds else "")
        )
        section.missing += _not_drawn(run)
    if without:
        section.missing.append(f"{', '.join(without)}: no event that happens or not, so no such curves.")
    return section


def _calibration(run: RunContents, studio: Studio) -> Section:
    section = Section("calibration", "Are the probabilities right?")
    table = run.table
    if table is None:
        section.missing.append("There is no file of predictions for this split, so no reliability diagrams.")
        return section
    changed = False
    for task in _drawn(run):
        if task not in table.predicted_names:
            continue
        predicted = {"as predicted": table.predicted(task)}
        if f"uncalibrated.{task}" in table.frame or f"uncalibrated.{task}" in table.classes:
            changed = True
            predicted = {"before": table.predicted(task, calibrated=False), "after": table.predicted(task)}
        picture = pictures.reliability_diagram(studio, task, run.kinds[task], table.labels(task), predicted)
        if picture is None:
            section.missing.append(f"{task} has no label in these rows: no reliability diagram.")
        else:
            section.pictures.append(picture)
    if section.pictures:
        section.text.append(
            "Rows sorted by prediction, in bins of equally many: on the diagonal, what was predicted is what happened. "
            "Bars are 95% intervals."
        )
        section.missing += _not_drawn(run)
    if not changed:
        section.missing.append(
            "Nothing was calibrated after training, so there is no before and after: `calibration` in the run's YAML "
            "does it."
        )
    return section


def _sharing(gates: Sequence[dict], gradients: Sequence[dict], together: Table | None, studio: Studio) -> Section:
    section = Section("sharing", "How the tasks share")
    section.tables += [] if together is None else [together]
    section.pictures += heat.expert_use(studio, gates) + heat.task_conflicts(studio, gradients)
    if gates:
        section.text.append(
            "Of each gate, the mean weight of each expert; rows that look alike share what they learn"
            + (" (+ is added beside the gate)." if any(use.get("native") for use in gates) else ".")
        )
    else:
        section.missing.append(
            "The trunk has no gates that choose among experts, or none was read: there is no map of their use."
        )
    if gradients:
        section.text.append("Cosines above 0: a step for one task helps the other; below 0: the tasks pull apart.")
    else:
        section.missing.append(f"How the tasks' gradients agree was not recorded: `{MEASURE}` in the run's YAML does.")
    return section


def _fusion(
    run: RunContents, studio: Studio, of_events: list[Event], shares: dict[str, float], whence: str, there: bool
) -> Section:
    section = Section("fusion", "What the fusion does")
    if not there:
        section.missing.append("The run has no fused score: `fusion` in its YAML declares one.")
        return section
    _add_weights(section, run, studio, shares, whence)
    for metric in dict.fromkeys(e.metric for e in of_events):
        rows = {e.task: e.rankings for e in of_events if e.metric == metric}
        title = f"{metric} of each event by three rankings"
        section.pictures.append(dots(studio, f"fusion events {metric}", title, metric, rows, guess=0.5))
    section.tables = [table for table in (tried_table(run.fitted), event_table(of_events)) if table is not None]
    section.tables += shown_tables(run)
    if not of_events:
        section.missing.append("No binary task's event is ranked by the fused score: it was not evaluated.")
    elif run.fused_anew:
        section.missing.append(
            "The fusion was changed after these rows were judged. Rankings, and curves of the fused score, are of the "
            "score before; weights, shares and what was tried are of the new one. `mtcl fuse RUN_DIR --rejudge` judges "
            "the rows by the new one."
        )
    front = pareto_pictures(studio, run.fitted)
    section.pictures += front
    if front:
        section.text.append(
            "The last pictures are the Pareto front: what the ranking of each event loses (to the right) for more of "
            "the target (upwards)."
        )
    else:
        section.missing.append("Weights were not fitted, so there is no Pareto front: `mtcl fuse RUN_DIR` draws it.")
    return section


def _add_weights(section: Section, run: RunContents, studio: Studio, shares: dict[str, float], whence: str) -> None:
    kind = str(run.fusion.get("kind") or "weighted_mean")
    how = f", found by {run.fitted['method']} for {run.fitted.get('target')}" if run.fitted.get("target") else ""
    section.text.append(f"The fused score is of the kind {kind}{how}.")
    weights = {str(t): float(w) for t, w in (run.fusion.get("weights") or {}).items()}
    if weights:
        section.pictures.append(bars(studio, "fusion weights", "Weight of each task", weights, "weight", percent=False))
    if shares:
        title, label = "Who decides the ranking", "share of the ranking within a request"
        section.pictures.append(bars(studio, "fusion influence", title, shares, label, percent=True))
        section.text.append(
            f"A weight is not an influence: a head whose predictions hardly differ decides little. Shares are {whence}."
        )


def _segments(run: RunContents) -> Section:
    section = Section("segments", "For whom, and for what")
    there = [t for t in _drawn(run) if run.table is None or t in run.table.predicted_names]
    of_kind = {kind: [t for t in there if run.kinds[t] == kind][:6] for kind in QUALITY}
    section.tables = segment_tables(run, {kind: tasks for kind, tasks in of_kind.items() if tasks})
    if not section.tables:
        section.missing.append("There are no columns by which rows could be told apart, or no file of predictions.")
    elif run.table is not None and not any(str(column).startswith("segment.") for column in run.table.frame):
        section.missing.append("By further columns: `evaluation: {segments: [hour]}` in the run's YAML, and the like.")
    return section


def _baselines(run: RunContents, studio: Studio, found: Qualities, compared: Sequence[Comparison]) -> Section:
    section = Section("baselines", "Against baselines")
    if not run.baselines:
        section.missing.append(
            "No baselines were trained: `mtcl baselines RUN_DIR` tunes popularity, item-kNN, factorisation, logistic "
            "regression, trees, single-task twins and more on the same splits."
        )
        return section
    section.tables = baseline_tables(run, found, compared)
    for task, of in found.items():
        metric = MAIN[run.kinds[task]]
        title = f"{label_of(metric)} of {task}"
        rows = {name: {label_of(metric): value} for name, value in of.items()}
        section.pictures.append(
            dots(studio, f"baselines {task}", title, title, rows, guess=GUESS[metric], metric=metric)
        )
    if not found:
        section.missing.append("The baselines' predictions for this split are missing: no confidence intervals.")
    return section


def _cost_missing(run: RunContents) -> list[str]:
    if run.metrics.get("cost"):
        return []
    return ["Samples per second, memory and parameters were not recorded: runs trained from now on record them."]
