"""What a recipe freezes, adapts and opens, refused before the weights of its model are read."""

from __future__ import annotations

from colfolio.commands.run_folder import TrainRecipe
from colfolio.errors import CheckpointError
from colfolio.models.generator_outline import model_outline_of
from colfolio.training.start import begin_policy, check_settings


def check_policy(recipe: TrainRecipe) -> None:
    """Refuse a policy that contradicts itself or names what the model does not have.

    Where only weights tell what a model is, the latter is found out once it is loaded.

    Raises:
        RecipeError: names the key.
    """
    settings = recipe.train
    check_settings(settings)
    is_full = not (settings.frozen or settings.lora or settings.thaw)
    if is_full:
        return
    try:
        model = model_outline_of(recipe.model, settings.objective).model
    except CheckpointError:  # told when the model is loaded, if it cannot be
        return
    begin_policy(model, settings)
