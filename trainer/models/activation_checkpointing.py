"""Activations computed twice instead of kept: memory for time."""

from diffusers.models.modeling_utils import ModelMixin


def enable_activation_checkpointing(model: ModelMixin) -> None:
    """Have a model compute the activations inside its blocks again in the backward pass instead of keeping them.

    Gradients keep their bits, dropout included: its random state is replayed. About a third more work.
    Raises: ValueError naming the model's class where diffusers offers none for it."""
    try:
        model.enable_gradient_checkpointing()  # diffusers' default: torch's checkpoint, not re-entrant
    except ValueError as error:
        name = type(model).__name__
        raise ValueError(
            f"train.activation_checkpointing=true: diffusers has none for {name}; set train.activation_checkpointing=false"
        ) from error
