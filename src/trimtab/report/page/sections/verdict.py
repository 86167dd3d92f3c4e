"""What became of the run: a sentence with its numbers; if it has not ended well, what to do."""

import math
import shlex
from collections.abc import Iterator

from trimtab.report.page import texts
from trimtab.report.page.html import Html, html, joined
from trimtab.report.page.run_files import RunFiles, measures, value_of
from trimtab.report.page.words import Words, fill, number, say


def verdict(run: RunFiles) -> Html:
    """The sentence, and notes below it."""
    return joined(
        [html('<p class="verdict {status}">{words}</p>', status=_status(run), words=say(_sentence(run))), *_notes(run)]
    )


def _status(run: RunFiles) -> str:
    if run.status == "failed" or (run.certificate and not run.certificate["passed"]):
        return "problem"
    return "good" if run.certificate else "note"


def _sentence(run: RunFiles) -> Words:
    outcome = _outcome(run)
    if run.status == "done":
        return fill(texts.SENTENCE, outcome=outcome, ending=_ending(run))
    reached = {"running": texts.RUNNING, "interrupted": texts.INTERRUPTED}.get(run.status, texts.FAILED)
    return fill(reached, step=number(run.step), steps=number(run.record.get("steps", 0)))


def _ending(run: RunFiles) -> Words:
    if run.certificate is None:
        damaged = any(message.startswith("certificate") for message in run.unreadable)
        unasked = "certify: false" in run.recipe
        return texts.CHANGED_CERTIFICATE if damaged else texts.NOT_CERTIFIED if unasked else texts.CERTIFYING
    failed = ", ".join(test["name"] for test in run.certificate["tests"] if test["status"] == "failed")
    return fill(texts.NOT_PASSED, tests=failed) if failed else texts.PASSED


def _outcome(run: RunFiles) -> Words:
    """How the validation loss has changed, as far as that has been measured."""
    objective = (run.record.get("objective") or {}).get("name", "sft")
    loss = texts.VALIDATION_LOSS if objective == "sft" else fill(texts.VALIDATION_LOSS_OF, objective=objective)
    best, first = run.best, next((line for line in run.evaluations if line["step"] == 0), None)
    if best is None:
        return _training_outcome(run)
    count = number(best.get("rows", 0))
    if first is None:
        return fill(texts.LOWEST, loss=loss, after=number(value_of(best)), count=count)
    before, after, interval = value_of(first), value_of(best), None
    from_base = not run.record.get("start")
    if from_base:  # which is what the certificate compares with
        measured = (run.certificate or {}).get("losses", {})
        certified = [measured.get(model, {}).get("held_out") for model in ("base", "adapter")]
        before, after = (before, after) if None in certified else certified
        interval = run.difference("gain")
    elif run.losses is not None:
        interval = run.change_of_losses()
    if interval is None:
        evidence = fill(texts.DIFFERENCE_ALONE, difference=signed(after - before), count=count)
        kind = texts.FELL if after < before else texts.ROSE
    else:
        value, low, high = map(signed, interval)
        evidence = fill(texts.DIFFERENCE, difference=value, low=low, high=high, count=count)
        kind = texts.FELL if interval.high < 0 else texts.ROSE if interval.low > 0 else texts.SAME
    return fill(kind, loss=loss, before=number(before), after=number(after), evidence=evidence)


def _training_outcome(run: RunFiles) -> Words:
    losses = [loss for line in run.train if math.isfinite(loss := value_of(line))]
    if not losses:
        return texts.NO_LOSS
    words = texts.NOT_EVALUATED if run.data.get("held_out") else texts.TRAINED_ONLY
    return fill(words, before=number(losses[0]), after=number(losses[-1]))


def _notes(run: RunFiles) -> Iterator[Html]:
    """What else is to be known at once."""
    if run.status != "done":
        if error := run.record.get("error"):
            yield html('<pre class="failed">{error}</pre>', error=error)
        advice = {"running": texts.IS_RUNNING, "interrupted": texts.TO_RESUME}.get(run.status, texts.AFTER_FAILURE)
        if not run.record.get("last") and run.status != "running":
            advice = texts.TO_START_AGAIN
        command = html("<code>{command}</code>", command=f"trimtab train {shlex.quote(str(run.folder / 'recipe.yaml'))}")
        yield html("<p>{advice}</p>", advice=say(advice, command=command))
        if run.best is not None or run.train:
            yield html("<p>{words}</p>", words=say(texts.SO_FAR, outcome=_outcome(run)))
    if reason := run.record.get("stopped"):
        yield html("<p>{words}</p>", words=say(texts.STOPPED_EARLY, reason=str(reason).removeprefix("stopped early ")))
    if skipped := sum("skipped" in line for line in run.train):
        yield html('<p class="note">{words}</p>', words=say(texts.SKIPPED, count=skipped))
    yield from (html("<p>{words}</p>", words=words) for words in _samples(run))
    if changed := _changed_examples(run):
        yield html("<p>{words}</p>", words=changed)


def _samples(run: RunFiles) -> Iterator[Html]:
    """What the sampled answers measure, before training and now."""
    if (now := run.answers) is None:
        return
    first, count, step = run.samples[0], len(now.get("answers", [])), number(now["step"])
    for name in measures([now]):
        measure = texts.MEASURES.get(name, name.replace("_", " "))
        values = {"measure": measure, "count": count, "step": step, "after": number(value_of(now, name))}
        if first["step"] == 0 and first is not now and name in first:
            yield say(texts.ANSWERS_CHANGED, before=number(value_of(first, name)), **values)
        else:
            yield say(texts.ANSWERS_NOW, **values)


def _changed_examples(run: RunFiles) -> Html | None:
    """Of how many validation examples the loss has fallen and risen."""
    losses = run.losses or {}
    before, best = losses.get("before"), losses.get("best")
    if not isinstance(before, list) or not isinstance(best, list) or len(before) != len(best):
        return None
    pairs = list(zip(before, best, strict=True))
    better, worse = sum(now < then for then, now in pairs), sum(now > then for then, now in pairs)
    return say(texts.EXAMPLES_CHANGED, count=number(len(pairs)), better=number(better), worse=number(worse))


def signed(value: float) -> str:
    """With its sign, also if that is a plus."""
    return f"{'+' if value > 0 else ''}{number(value)}"
