"""The validation examples whose answers a run generates at each of its evaluations."""

from collections.abc import Callable

from trimtab.base import Base
from trimtab.data import Conversation, LoadedData, held_out_examples
from trimtab.evaluate import Exam, UserFunction
from trimtab.run.recipe import Recipe


def sample_exam(recipe: Recipe, base: Base, data: LoadedData, on_notice: Callable[[str], None]) -> Exam | None:
    """The first `eval.samples` validation examples as an exam; None if none are asked for, or none of them asks for an answer.

    Raises:
        RecipeError, DataError: A metric can't be used, or not on these examples.
    """
    if not recipe.eval.samples:
        return None
    held_out = held_out_examples(recipe.absolute().data, data.plain(), recipe.objective.data_kind)
    conversations = [example for example in held_out if isinstance(example, Conversation)][: recipe.eval.samples]
    if not conversations:
        on_notice("eval.samples: the validation examples are plain texts, which ask for no answers")
        return None
    function = UserFunction(recipe.eval.function, on_notice) if recipe.eval.function is not None else None
    exam = Exam(base, conversations, recipe.eval, function)
    for note in exam.notes:
        on_notice(note)
    return exam
