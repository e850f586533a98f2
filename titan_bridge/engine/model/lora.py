"""LoRA adapters in PEFT's format on TorchTitan's linear layers, managed by vLLM: loaded, evicted and mixed in a batch.

A linear layer that may have adapters adds theirs inside of its own forward, before the collective that `lower` puts
behind it: each rank's part of a sum gets its part of the adapter, and the sum is reduced once. Parameters keep their
names, so that loading, specs and weight transfer see nothing of it.

An adapter names Hugging Face's modules. Where several of them are slices of one weight here (q, k and v of `wqkv`),
each has its own ranks and fills its own rows; the family's views say which.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import TokenChoiceTopKRouter
from vllm.config.lora import LoRAConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.punica_wrapper import PunicaWrapperBase
from vllm.lora.request import LoRARequest
from vllm.lora.utils import is_in_target_modules

from titan_bridge.engine.model.latent import LatentCache
from titan_bridge.errors import BridgeError
from titan_bridge.models.peft import WEIGHT, linear_views, rows_of
from titan_bridge.sharding.boxes import Segment, dim_segments
from titan_bridge.sharding.layout import Layout
from titan_bridge.sharding.view import View

if TYPE_CHECKING:
    from titan_bridge.engine.model.build import Setup
    from titan_bridge.engine.model.wrapper import TitanForCausalLM


@dataclass(frozen=True, kw_only=True)
class Target:
    """A linear layer that may have adapters."""

    fqn: str
    """Of the module."""
    module: Linear
    views: tuple[View, ...]
    """Of the Hugging Face weights that its weight is made of."""

    @property
    def names(self) -> tuple[str, ...]:
        """Hugging Face's names of the modules, e.g. `model.layers.0.self_attn.q_proj`."""
        return tuple(view.name.removesuffix(WEIGHT) for view in self.views)


def targets(model: Decoder, setup: Setup) -> Iterator[Target]:
    """The linear layers of attention and of dense and shared feed-forwards, in the model's order."""
    by_fqn = linear_views(setup.family.views(setup.hf, padded_vocab=setup.padded_vocab))
    others: set[nn.Module | None] = {model.lm_head}  # and those whose weights something else multiplies by
    for module in model.modules():
        if isinstance(module, TokenChoiceTopKRouter):
            others.add(module.gate)
        elif isinstance(inner := getattr(module, "inner_attention", None), LatentCache):
            others.add(getattr(module, inner.expands))
    for fqn, module in model.named_modules():
        if isinstance(module, Linear) and module not in others and (views := by_fqn.get(fqn + WEIGHT)):
            yield Target(fqn=fqn, module=module, views=tuple(views))


class _AddsAdapters(nn.Module):
    """First base of a linear layer's class: adds what the adapters of each token say."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`(..., in_features)` to `(..., out_features)`, both this rank's."""
        out = super().forward(input)
        adapters: Adapters | None = self.__dict__.get("_adapters")
        return out if adapters is None else adapters.add_to(out, input)


def accept_adapters(model: Decoder, setup: Setup) -> None:
    """Make every target's class one that adds adapters, in place; before `lower`, which holds on to forwards."""
    for target in targets(model, setup):
        kind = type(target.module)
        target.module.__class__ = type(f"Adapted{kind.__name__}", (_AddsAdapters, kind), {})


class Adapters:
    """This rank's parts of the adapters of one target, a slot for each that vLLM holds ready.

    `a` is `(slots + 1, 1, R, in_features)` and `b` `(slots + 1, 1, out_features, R)`, where R counts the largest rank
    once for each Hugging Face module. The last slot stays zero: vLLM's operators for CPUs give it, as index -1, to
    tokens without an adapter.
    """

    def __init__(
        self,
        target: Target,
        layout: Layout,
        config: LoRAConfig,
        punica: PunicaWrapperBase,
        device: torch.device,
    ) -> None:
        weight = target.fqn + WEIGHT
        param, mesh, rank = layout.param(weight), layout.mesh_of(weight), dist.get_rank()
        coordinate = mesh.coordinate(rank)
        assert coordinate is not None
        self._rows, self._columns = dim_segments(param.spec.placements, param.shape, mesh.shape, coordinate)
        self.target, self._punica, self._rank = target, punica, config.max_lora_rank
        self._out_features = param.shape[0]
        slots, ranks = config.max_loras + 1, len(target.views) * config.max_lora_rank
        here: dict[str, Any] = {"dtype": config.lora_dtype, "device": device}
        self.a = torch.zeros(slots, 1, ranks, _length(self._columns), **here)
        self.b = torch.zeros(slots, 1, _length(self._rows), ranks, **here)

    def add_to(self, out: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        """`out` plus what the adapters of its tokens make of `input`."""
        out_TF, input_TD = out.flatten(0, -2), input.flatten(0, -2)
        self._punica.add_lora_linear(out_TF, input_TD, (self.a,), (self.b,), 1.0, (out_TF.shape[-1],))
        return out_TF.view(out.shape)

    def reset_lora(self, index: int) -> None:
        """Empty a slot; vLLM's name."""
        self.a[index].zero_()
        self.b[index].zero_()

    def set_lora(
        self, index: int, lora_a: list[torch.Tensor | None], lora_b: list[torch.Tensor | None]
    ) -> None:
        """Fill a slot with whole matrices `(rank, in_features)` and `(out_features, rank)`, in the order of the views.

        vLLM's name. None for a module that the adapter leaves alone; `lora_b` is scaled.
        """
        self.reset_lora(index)
        for part, (view, a, b) in enumerate(zip(self.target.views, lora_a, lora_b, strict=True)):
            if a is None or b is None:
                continue
            rank = a.shape[0]
            ranks = slice(part * self._rank, part * self._rank + rank)
            for start, stop, at in self._columns:
                self.a[index, 0, ranks, at : at + stop - start] = a[:, start:stop]
            whole = torch.zeros(self._out_features, rank, dtype=b.dtype)
            rows_of(view, rank).write(whole, b)
            for start, stop, at in self._rows:
                self.b[index, 0, at : at + stop - start, ranks] = whole[start:stop]


def _length(segments: tuple[Segment, ...]) -> int:
    return sum(stop - start for start, stop, _ in segments)


class _Pair(NamedTuple):
    """What vLLM's manager hands to `Adapters.set_lora`."""

    lora_a: list[torch.Tensor | None]
    lora_b: list[torch.Tensor | None]


class AdapterManager(LRUCacheLoRAModelManager):
    """vLLM's manager of adapters, for `TitanForCausalLM`: its slots are those of our targets."""

    model: TitanForCausalLM  # type: ignore[assignment]
    modules: dict[str, Adapters]  # type: ignore[assignment]

    def __init__(self, *given: Any, **options: Any) -> None:
        self.names: dict[str, int] = {}
        """Of each name the adapter that was loaded last."""
        self.live: dict[int, LiveAdapter] = {}
        """Those that a trainer has updated."""
        super().__init__(*given, **options)

    def loaded(self, adapter: LoRAModel, request: LoRARequest) -> None:
        """Told of each adapter that was read from its folder, before it is used."""
        self.names[request.lora_name] = adapter.id
        adapter.load_inplace = request.load_inplace  # type: ignore[attr-defined]
        # By the folder's rule (rsLoRA, patterns); vLLM multiplies them into B as it takes the adapter over.
        adapter.scalings = {lora.scaling for lora in adapter.loras.values()}  # type: ignore[attr-defined]
        if adapter.id in self.live:
            self.live[adapter.id].fill(adapter)

    def _create_lora_modules(self) -> None:
        wanted = self.lora_config.target_modules
        for target in self.model.adapter_targets():
            if any(is_in_target_modules(name, wanted) for name in target.names):
                adapters = Adapters(
                    target, self.model.layout, self.lora_config, self._get_punica_wrapper(target.fqn), self.device
                )  # fmt: skip
                self.modules[target.fqn] = target.module.__dict__["_adapters"] = adapters

    def _get_lora_layer_weights(self, lora_model: LoRAModel, module_name: str) -> Any:
        found = [lora_model.get_lora(name) for name in self.modules[module_name].target.names]
        if not any(found):
            return None
        return _Pair(
            [lora and lora.lora_a for lora in found],
            [lora and lora.lora_b for lora in found],
        )

    def _validate_moe_lora_format(self, lora_model: LoRAModel) -> None:
        """Refuse matrices that would be left out; vLLM calls it for every adapter, before it makes room for one."""
        names = {name for adapters in self.modules.values() for name in adapters.target.names}
        wanted = self.lora_config.target_modules
        elsewhere = self.model.names_elsewhere()  # the stage that has them says whether it takes them
        left = sorted(
            name
            for name in lora_model.loras
            if name not in elsewhere and (name not in names or not is_in_target_modules(name, wanted))
        )
        if left:
            raise BridgeError(
                f"the adapter has matrices for {', '.join(left[:4])}{' and others' if len(left) > 4 else ''}, which "
                "take none; allowed: linear layers of attention and of dense and shared feed-forwards"
                f"{', as far as lora_target_modules says' if wanted else ''}"
            )


class LiveAdapter:
    """An adapter that a trainer updates: its matrices by TorchTitan's names, and the way into vLLM's adapter.

    vLLM evicts adapters and loads them from their folders again; one that is loaded again gets these matrices.
    """

    def __init__(self, manager: AdapterManager, name: str, scaling: float | None) -> None:
        """Raises BridgeError where no adapter of this name is loaded, or one whose folder vLLM reads again; and without
        a `scaling`, where the folder has several."""
        if name not in manager.names:
            raise BridgeError(
                f"no LoRA adapter {name!r} is loaded; loaded: {', '.join(sorted(manager.names)) or 'none'} "
                "(--lora-modules NAME=FOLDER, or POST /v1/load_lora_adapter)"
            )
        if (adapter := manager.list_adapters().get(manager.names[name])) is None:
            raise BridgeError(
                f"LoRA adapter {name!r} is not in use, and vLLM has dropped it; raise --max-cpu-loras"
            )
        if adapter.load_inplace:
            raise BridgeError(
                f"LoRA adapter {name!r} was loaded with load_inplace: its folder is read again and again"
            )
        if scaling is None and len(adapter.scalings) > 1:
            raise BridgeError(
                f"LoRA adapter {name!r} scales modules by {sorted(adapter.scalings)} (alpha_pattern or rank_pattern) "
                "and the trainer says no scale; allowed: one for all, or a trainer that is given the model, not tensors"
            )
        self._manager, self.name, self.id = manager, name, adapter.id
        self._scaling = next(iter(adapter.scalings)) if scaling is None else scaling
        self._alpha = next(iter(adapter.loras.values())).lora_alpha
        self.tensors: dict[str, torch.Tensor] = {}
        """Whole matrices, in the engine's dtype for adapters, as they came last."""
        for fqn, adapters in manager.modules.items():
            found = [lora for each in adapters.target.names if (lora := adapter.get_lora(each))]
            if not found:
                continue
            rows, columns = adapters.target.views[0].titan_shape
            for half, shape in ("a", (found[0].rank, columns)), ("b", (rows, found[0].rank)):
                dtype = manager.lora_config.lora_dtype
                self.tensors[f"{fqn}.lora_{half}{WEIGHT}"] = torch.zeros(shape, dtype=dtype)

    def checked(self) -> dict[str, torch.Tensor]:
        """`tensors`. Raises BridgeError where another adapter has got the name."""
        if self._manager.names.get(self.name) != self.id:
            raise BridgeError(f"LoRA adapter {self.name!r} was loaded anew; connect again")
        return self.tensors

    def write(self, names: Iterable[str] = (), ahead: None = None) -> None:
        """Make the matrices live: in the adapter, and in its slot if it has one."""
        manager = self._manager
        manager.live[self.id] = self
        if (adapter := manager.list_adapters().get(self.id)) is None:
            return
        self.fill(adapter)
        if self.id in manager.lora_index_to_id:
            index = manager.lora_index_to_id.index(self.id)
            for fqn, module in manager.modules.items():
                if (pair := manager._get_lora_layer_weights(adapter, fqn)) is not None:
                    module.set_lora(index, pair.lora_a, pair.lora_b)

    def fill(self, adapter: LoRAModel) -> None:
        """Put the matrices into an adapter of vLLM's."""
        for fqn in {name.rpartition(".lora_")[0] for name in self.tensors}:
            a, b = (self.tensors[f"{fqn}.lora_{half}{WEIGHT}"] for half in "ab")
            rank = a.shape[0]
            for view in self._manager.modules[fqn].target.views:
                name, part = view.name.removesuffix(WEIGHT), rows_of(view, rank).read(b) * self._scaling
                adapter.loras[name] = LoRALayerWeights(name, rank, self._alpha, a, part, scaling=1.0)
