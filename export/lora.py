"""Low-rank adapters on the linear layers of a frozen network (LoRA, Hu et al. 2021, arXiv:2106.09685).

Each target ``W`` becomes ``W + alpha / rank * B A`` with ``A`` (rank, in) random and ``B`` (out, rank) zero
at first, so that training starts from the network as it is. Only ``A`` and ``B`` are trained.
"""

from __future__ import annotations

from torch import nn

from export.backbones import Backbone
from export.errors import RecipeError
from export.recipe import Lora


def attach(backbone: Backbone, settings: Lora) -> None:
    """Freeze a network and put adapters on its target layers, in place.

    Raises:
        RecipeError: The network has no linear layer of a target's name.
    """
    from peft import LoraConfig, inject_adapter_in_model

    layers = [name.rpartition(".")[2] for name, layer in backbone.named_modules() if isinstance(layer, nn.Linear)]
    unknown = [target for target in settings.targets if target not in layers]
    if unknown:
        raise RecipeError(
            f"lora: the network has no linear layer named {', '.join(unknown)}. Use some of: "
            f"{', '.join(dict.fromkeys(layers))}."
        )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # stated as int, but only divided
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
    )
    inject_adapter_in_model(config, backbone)


def merge(backbone: Backbone) -> None:
    """Add the adapters' products to the weights below them and take the adapters off, in place.

    Raises:
        RecipeError: An adapter holds values that are not finite.
    """
    from peft.tuners.lora import LoraLayer

    for name, layer in list(backbone.named_modules()):
        if not isinstance(layer, LoraLayer):
            continue
        try:
            layer.merge(safe_merge=True)
        except ValueError:  # what peft raises for values that are not finite
            raise RecipeError(
                f"lora: the adapter of {name} holds values that are not finite. Train with a lower learning_rate."
            ) from None
        parent, _, child = name.rpartition(".")
        setattr(backbone.get_submodule(parent), child, layer.get_base_layer())
    del backbone.peft_config
    backbone.requires_grad_(True)
