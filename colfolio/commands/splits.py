"""What a run trains on, and what it is validated on while it goes on."""

from __future__ import annotations

from typing import NamedTuple

from colfolio.commands.run_folder import TrainRecipe
from colfolio.data.conversations import ConversationDataset, load_conversations
from colfolio.data.dataset import RetrievalDataset, load_dataset
from colfolio.diagnosis.planning import memory_here
from colfolio.errors import DatasetError, RecipeError
from colfolio.evaluation import Pool, draw_pool, validation_metrics
from colfolio.models.precision import autocast
from colfolio.training import TrainingState
from colfolio.training.text_objective import text_metrics

_METRIC = "ndcg@5"
_BYTES_OF_A_PAIR = 12  # score, relevance, and what is compared on the way to ranks


class Validation(NamedTuple):
    """A held-out split, and the negatives that its queries have in every evaluation.

    Conversations have no negatives.
    """

    dataset: RetrievalDataset | ConversationDataset
    pool: Pool | None


class Splits(NamedTuple):
    """The data of a run; `validation` is None where the recipe has none."""

    train: RetrievalDataset | ConversationDataset
    validation: Validation | None


def check_validation(recipe: TrainRecipe) -> None:
    """Refuse negatives where there are none.

    Raises:
        RecipeError: names the key in `validation`.
    """
    pool = recipe.validation.pool
    if recipe.train.objective == "generation" and pool is not None:
        raise RecipeError(
            f"is {pool}, and objective generation has no negatives to draw; leave it out", "pool"
        )


def load_splits(recipe: TrainRecipe) -> Splits:
    """The splits that a recipe names.

    Raises:
        DatasetError: one cannot be read, has fewer negatives than the recipe asks for, is of
            another objective, or is too large to validate on.
    """
    if recipe.train.objective == "generation":
        return _conversations(recipe)
    train = load_dataset(recipe.dataset, recipe.split)
    if recipe.validation.split is None:
        return Splits(train, None)
    held_out = load_dataset(recipe.dataset, recipe.validation.split)
    _check_room(held_out)
    return Splits(train, Validation(held_out, draw_pool(held_out, recipe.validation.pool)))


def _check_room(held_out: RetrievalDataset) -> None:
    """Refuse a split whose scores do not fit, before a run has spent hours on its way to them."""
    queries, documents = len(held_out.queries), len(held_out.corpus)
    needed, room = queries * documents * _BYTES_OF_A_PAIR, memory_here()
    if needed > room:
        raise DatasetError(
            f"{held_out.name}, split {held_out.split!r}: validation ranks each of {queries:,} "
            f"queries among all {documents:,} documents, which takes {needed / 2**30:.1f} GiB, and "
            f"this machine has {room / 2**30:.1f}; validate on a smaller split, or on none "
            "(validation.split=null)"
        )


def _conversations(recipe: TrainRecipe) -> Splits:
    train = load_conversations(recipe.dataset, recipe.split)
    if recipe.validation.split is None:
        return Splits(train, None)
    return Splits(
        train, Validation(load_conversations(recipe.dataset, recipe.validation.split), None)
    )


def validate(state: TrainingState, validation: Validation) -> dict[str, float]:
    """What the model is worth now; every rank asks, because a sharded model runs on all or none."""
    dataset, pool = validation
    if isinstance(dataset, ConversationDataset):
        return text_metrics(state, dataset)
    assert pool is not None
    with autocast(state.settings.precision, state.retriever.device):
        temperature = state.settings.loss.temperature
        return validation_metrics(state.retriever, dataset, pool, temperature, [_METRIC])


def pool_line(validation: Validation | None) -> str:
    """What validation loss is over, for the ledger; empty without validation."""
    pool = validation.pool if validation else None
    if pool is None:
        return ""
    return (
        f"loss of {pool.num_queries:,} queries, each beside the same {pool.size} negatives every "
        f"time: chance {pool.chance:.3f}"
    )
