"""The trained scorer. In: tokens, time, condition and history of a layer. Out: importance [B, N], high is kept.

Legend: B samples, N tokens, D token width, C condition width, E bottleneck, T time features, F history features.
Equation numbers are those of Shiva-DiT, arXiv 2602.05605.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from shiva_search.errors import InputError
from shiva_search.models.model import Model
from shiva_search.runtime.scorers import History, Stride
from shiva_search.runtime.selector import Selector

FEATURES = ("age", "update_size", "spread")
_EPSILON = 1e-5  # of LayerNorm


@dataclass(frozen=True)
class RouterConfig:
    """The shape of a router.

    Attributes:
        width: D, width of the tokens.
        condition_width: C, width of the backbone's condition.
        layers: blocks of the model.
        bottleneck: E, the width everything is projected to.
        group: adjacent layers that share one set of weights, told apart by their embedding.
        time_features: T, sines and cosines of the timestep (even).
        features: what else is known of a token, beyond the paper. "age": how many layers ago it was last processed;
            "update_size": how far the layer before moved it; "spread": where it stands in the even spread that
            `stride` keeps, a pattern that a router starts from and learns to depart from.

    Raises:
        InputError: a size below 1 or an unknown feature.
    """

    width: int
    condition_width: int
    layers: int
    bottleneck: int = 64
    group: int = 2
    time_features: int = 64
    features: tuple[str, ...] = ("age", "spread")

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", tuple(self.features))
        for name in ("width", "condition_width", "layers", "bottleneck", "group", "time_features"):
            if getattr(self, name) < 1:
                raise InputError(f"a router's {name} is at least 1, got {getattr(self, name)}")
        unknown = [name for name in self.features if name not in FEATURES]
        if unknown or self.time_features % 2:
            raise InputError(
                f"a router's features are some of {', '.join(FEATURES)} and time_features is even, "
                f"got {list(self.features)} and {self.time_features}"
            )


class _Unit(nn.Module):
    """The weights that one group of layers shares (eq. 8, 9)."""

    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        wide = config.bottleneck
        history = [name for name in config.features if name != "spread"]
        self.tokens = nn.Linear(config.width, wide, bias=False)  # P_x
        self.time = nn.Linear(config.time_features, wide)  # P_t
        self.condition = nn.Linear(config.condition_width, wide, bias=False)  # P_c
        self.layer = nn.Embedding(config.group, wide)  # P_l and the layer embedding in one
        self.history = nn.Linear(len(history), wide, bias=False) if history else None
        # A bias would raise all scores alike. Starting small lets the even spread, or noise, choose at first.
        self.score = nn.Parameter(torch.randn(wide) * 0.1 / math.sqrt(wide))  # w
        self.spread = nn.Parameter(torch.ones(config.group)) if "spread" in config.features else None


class Router(Selector):
    """Scores tokens: h = P_t(t) + P_c(condition) + P_l(layer), s_i = w . LayerNorm(SiLU(P_x(x_i) + h)) (eq. 8, 9).

    A TokenScorer: `router(x_BND, t_B, condition_BC, layer, history=...)`. Tokens are normalised first, since their
    size grows from layer to layer, and may come in any floating dtype; scores are float32. Shapes are static and
    nothing is synchronised. No gradient flows back into the tokens: a router learns from what its own choice did.

    Attributes:
        config: shape.
        uses_history: whether the runtime should keep a History for it.
        model, origin: see Selector.
    """

    kind = "shiva-search router"

    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        self.config = config
        self.uses_history = any(name != "spread" for name in config.features)
        self.uses_update_size = "update_size" in config.features
        self.units = nn.ModuleList(_Unit(config) for _ in range(math.ceil(config.layers / config.group)))
        self._stride = Stride()
        self._spreads: dict[tuple[int, int, torch.device], torch.Tensor] = {}

    @property
    def shape(self) -> dict[str, Any]:
        """See Selector."""
        return asdict(self.config)

    @classmethod
    def of_shape(cls, shape: Mapping[str, Any]) -> Router:
        """An untrained router; what a later release may have added to the shape is left out."""
        known = {item.name for item in fields(RouterConfig)}
        return cls(RouterConfig(**{name: value for name, value in shape.items() if name in known}))

    @classmethod
    def for_model(cls, model: Model, seed: int = 0, **shape: Any) -> Router:
        """An untrained router for a model, on its device; one forward finds the widths.

        Args:
            model: the model.
            seed: same seed, same weights.
            **shape: fields of RouterConfig that differ from its defaults.

        Raises:
            InputError: layers of different widths, or a bad shape.
        """
        width, condition_width = widths_of(model)
        config = RouterConfig(width, condition_width, model.layer_count, **shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            router = cls(config)
        router.model = model.fingerprint()
        device = next(model.module.parameters()).device
        return router if device.type == "meta" else router.to(device)  # of shapes only, widths can still be read

    def forward(
        self,
        x_BND: torch.Tensor,
        t_B: torch.Tensor,
        condition_BC: torch.Tensor,
        layer: int,
        history: History | None = None,
    ) -> torch.Tensor:
        """Scores [B, N], float32.

        Args:
            x_BND: tokens as they enter the layer, any floating dtype.
            t_B: normalised time in [0, 1], 1 is noise.
            condition_BC: the backbone's own embedding of timestep and condition.
            layer: index of the layer.
            history: what happened to the tokens so far; None stands for nothing yet.
        """
        unit: _Unit = self.units[layer // self.config.group]  # type: ignore[assignment]
        x_BND = x_BND.detach()
        # Scores decide near-ties, so they are kept out of a surrounding autocast.
        with torch.autocast(x_BND.device.type, enabled=False):
            h_BE = (
                unit.time(sinusoid(t_B.float(), self.config.time_features))
                + unit.condition(condition_BC.detach().float())
                + unit.layer.weight[layer % self.config.group]
            )
            hidden_BNE = _project_normalised(x_BND, unit.tokens.weight, h_BE)
            if unit.history is not None and history is not None:
                for feature_BN, weight_E in zip(self._history(history), unit.history.weight.unbind(1), strict=True):
                    hidden_BNE = torch.addcmul(hidden_BNE, feature_BN[..., None], weight_E)
            active_BNE = F.silu(hidden_BNE, inplace=not hidden_BNE.requires_grad)
            # w . LayerNorm(...): the weight inside the norm and a sum take half the time of a norm and a product.
            scores_BN = F.layer_norm(active_BNE, active_BNE.shape[-1:], unit.score).sum(dim=-1)
            if unit.spread is not None:
                scores_BN = scores_BN + unit.spread[layer % self.config.group] * self._even_spread(x_BND, layer)
        return scores_BN

    def _history(self, history: History) -> list[torch.Tensor]:
        """Each feature [B, N], on a logarithmic scale: one layer more matters most for a token just processed."""
        named = {"age": history.age_BN, "update_size": history.update_size_BN}
        return [named[name].float().log1p() for name in self.config.features if name in named]

    def _even_spread(self, x_BND: torch.Tensor, layer: int) -> torch.Tensor:
        """The even spread of a layer, [1, N]; it is the same in every forward."""
        if torch.compiler.is_compiling():
            return self._stride.order(x_BND.shape[1], layer, x_BND.device)[None]
        key = (x_BND.shape[1], layer, x_BND.device)
        if key not in self._spreads:
            with torch.inference_mode(False):  # so that training may use it later
                self._spreads[key] = self._stride.order(*key)[None]
        return self._spreads[key]


def _project_normalised(x_BND: torch.Tensor, weight_ED: torch.Tensor, h_BE: torch.Tensor) -> torch.Tensor:
    """P_x(LayerNorm(x)) + h, [B, N, E] float32, with nothing of the tokens' size written but the result.

    Rows of the weight that add up to zero take the mean out of x by themselves, without cancellation; what is left of
    the normalisation is one factor per token.
    """
    if x_BND.dtype == torch.float16:
        x_BND = x_BND.float()  # sums over features that were not normalised may overflow
    centred_ED = weight_ED - weight_ED.mean(dim=1, keepdim=True)
    projected_BNE = F.linear(x_BND, centred_ED.to(x_BND.dtype)).float()
    square_BN = torch.linalg.vector_norm(x_BND, dim=-1, dtype=torch.float32).square() / x_BND.shape[-1]
    variance_BN = square_BN - x_BND.mean(dim=-1, dtype=torch.float32).square()
    scale_BN = (variance_BN.clamp_min(0.0) + _EPSILON).rsqrt()
    return torch.addcmul(h_BE[:, None], projected_BNE, scale_BN[..., None])


def sinusoid(t_B: torch.Tensor, features: int) -> torch.Tensor:
    """Cosines and sines [B, features] of normalised time in [0, 1], periods from 0.06 to 6 of it, geometric."""
    half = features // 2
    frequency_H = torch.exp(torch.linspace(0.0, math.log(100.0), half, device=t_B.device))
    angle_BH = t_B[:, None] * frequency_H
    return torch.cat([angle_BH.cos(), angle_BH.sin()], dim=-1)


def widths_of(model: Model) -> tuple[int, int]:
    """D and C, from one forward of the example."""
    found: set[tuple[int, int]] = set()
    hooks = []
    for layer in model.layers:

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layer: Any = layer) -> None:
            named = {**kwargs, **dict(zip(layer.arguments, args, strict=False))}
            condition_BC = layer.adapter.condition(module, named)
            found.add((named[layer.adapter.tokens].shape[-1], condition_BC.shape[-1]))

        hooks.append(layer.module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        with torch.no_grad():
            model.predict(model.example())
    finally:
        for hook in hooks:
            hook.remove()
    if len(found) != 1:
        raise InputError(f"a selector needs layers of one token and one condition width, found {sorted(found)}")
    return found.pop()
