"""Learning from a stream, chunk by chunk, in memory that does not grow with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recurra import _files
from recurra._files import CheckpointError
from recurra.ops.rtrl import Sensitivities, rtrl_gradient, rtrl_update
from recurra.rtrl.layer import Layer

TENSORS, ABOUT = "learner.safetensors", "learner.json"
ALGORITHMS = ("rtrl", "bptt")


class Fed(NamedTuple):
    """What came of a chunk.

    Attributes:
        loss: a scalar, before the update.
        output: of the readout, (B, T, ...); detached.
    """

    loss: Tensor
    output: Tensor


class OnlineLearner:
    """Feeds a stream to recurrent layers and a readout, and updates them while it goes.

    The gradient of the loss of every chunk is backpropagated within the chunk, and what reaches
    the state at its start meets the sensitivities of that state to the parameters. For one layer
    this is the gradient of backpropagation through the whole past, without its memory: exact while
    the weights stay, and with sensitivities that are as old as the updates in between otherwise.

    In a stack every layer keeps the sensitivities of its own state alone. The gradient of the top
    layer is exact; that of a layer below lacks how its past acts through the *states of the layers
    above* at the start of the chunk ("spatial" backpropagation, Zucchet et al.,
    arXiv 2305.15947; Irie et al., arXiv 2305.19044). ``recurra diag bias`` measures what that is.

    Args:
        layers: a :class:`Layer`, or several from the input to the top.
        readout: a module that maps the outputs of the top layer, (B, T, N), to what ``loss`` takes;
            must not carry a state from chunk to chunk. Trained as well.
        loss: ``loss(output, target)``, a scalar.
        optimizer: makes an optimizer from a list of parameters.
        clip: largest norm of the gradient; none when None.
        algorithm: "rtrl", or "bptt" for backpropagation truncated at the starts of the chunks.

    Attributes:
        exact: for each layer whether its gradient is that of the whole past.
        chunks: how many were fed.

    Raises:
        ValueError: there is no layer, their sizes do not fit, or ``algorithm`` is unknown.
    """

    def __init__(
        self,
        layers: Layer | Sequence[Layer],
        readout: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = torch.optim.Adam,
        *,
        clip: float | None = None,
        algorithm: str = "rtrl",
    ):
        self.layers = nn.ModuleList([layers] if isinstance(layers, Layer) else layers)
        if not len(self.layers):
            raise ValueError("OnlineLearner: layers must hold at least one")
        for below, above in zip(self.layers, self.layers[1:], strict=False):
            if above.inputs != below.out_features:
                raise ValueError(
                    f"OnlineLearner: a layer with {above.inputs} inputs cannot follow one with "
                    f"{below.out_features} outputs"
                )
        if algorithm not in ALGORITHMS:
            raise ValueError(
                f'OnlineLearner: algorithm must be "rtrl" or "bptt", got "{algorithm}"'
            )
        self.readout, self.loss, self.clip, self.algorithm = readout, loss, clip, algorithm
        self.parameters = [*self.layers.parameters(), *readout.parameters()]
        self.optimizer = optimizer([p for p in self.parameters if p.requires_grad])
        self.exact = tuple(
            algorithm == "rtrl" and layer is self.layers[-1] for layer in self.layers
        )
        self.chunks = 0
        self._h: list[Tensor] = []
        self._S: list[Sensitivities] = []

    def __repr__(self) -> str:
        layers = ", ".join(f"{x.cell} {x.inputs} -> {x.channels}" for x in self.layers)
        if self.algorithm == "bptt":
            how = "truncated backpropagation"
        elif len(self.layers) == 1:
            how = "exact RTRL"
        else:
            how = "RTRL, exact for the top layer, spatial for those below it"
        return f"OnlineLearner({layers}; {how})"

    @property
    def state(self) -> tuple[Tensor, ...]:
        """The state of every layer, (B, K, N); empty before the first chunk."""
        return tuple(self._h)

    @property
    def sensitivities(self) -> tuple[Sensitivities, ...]:
        """Those of every layer; empty before the first chunk and for "bptt"."""
        return tuple(self._S)

    def begin(self, batch: int, state: Iterable[Tensor] | None = None) -> None:
        """Begins new streams, from zero or from given states, which are taken as constants.

        Args:
            batch: streams, B.
            state: (B, K, N) for every layer.

        Raises:
            ValueError: a state has another shape.
        """
        self._h = [layer.initial_state(batch) for layer in self.layers]
        if state is not None:
            given = [h.detach().clone() for h in state]
            shapes = [tuple(h.shape) for h in given]
            wanted = [tuple(h.shape) for h in self._h]
            if shapes != wanted:
                raise ValueError(
                    f"OnlineLearner.begin: state must have shapes {wanted}, got {shapes}"
                )
            self._h = given
        self._S = (
            [layer.initial_sensitivities(batch) for layer in self.layers]
            if self.algorithm == "rtrl"
            else []
        )

    def accumulate(self, u: Tensor, target: Tensor, reset: Tensor | None = None) -> Fed:
        """Adds the gradient of a chunk to ``grad`` of the parameters and goes on in the stream.

        Args:
            u: (B, T, D).
            target: what ``loss`` wants.
            reset: (B, T) of bool; where True a new sequence begins at that step.

        Returns:
            Fed.

        Raises:
            ValueError: ``u`` has another batch size than the streams.
            RuntimeError: a shape or dtype is wrong.
        """
        if u.dim() != 3 or u.shape[2] != self.layers[0].inputs:
            raise ValueError(
                f"OnlineLearner: u must have shape (B, T, D) with D = {self.layers[0].inputs}, got "
                f"{tuple(u.shape)}"
            )
        if u.shape[1] == 0:
            raise ValueError("OnlineLearner: u must have at least one step, got T = 0")
        if not self._h:
            self.begin(u.shape[0])
        if u.shape[0] != self._h[0].shape[0]:
            raise ValueError(
                f"OnlineLearner: u must have B = {self._h[0].shape[0]} as the streams before it, "
                f"got {tuple(u.shape)}; begin() begins new ones"
            )
        starts = [h.detach().requires_grad_() for h in self._h]
        inputs, ends = [], []
        with torch.enable_grad():
            y = u
            for layer, h in zip(self.layers, starts, strict=True):
                x = layer.project(y)
                inputs.append((y.detach(), x.detach()))
                y, end = layer.recur(x, h, reset)
                ends.append(end.detach())
            output = self.readout(y)
            loss = self.loss(output, target)
            wanted = [p for p in self.parameters if p.requires_grad]
            found = torch.autograd.grad(
                loss, [*wanted, *starts], allow_unused=True, materialize_grads=True
            )
        for p, g in zip(wanted, found, strict=False):
            p.grad = g if p.grad is None else p.grad + g
        if self.algorithm == "rtrl":
            self._follow(inputs, starts, found[len(wanted) :], reset)
        self._h = ends
        self.chunks += 1
        return Fed(loss.detach(), output.detach())

    @torch.no_grad()
    def _follow(
        self,
        inputs: list[tuple[Tensor, Tensor]],
        starts: list[Tensor],
        of_starts: Sequence[Tensor],
        reset: Tensor | None,
    ) -> None:
        """Adds what the past owes and carries the sensitivities over the chunk."""
        chunks = zip(self.layers, self._S, inputs, starts, of_starts, strict=True)
        for layer, S, (u, x), h, dh in chunks:
            past = rtrl_gradient(S, dh)
            for p, g in (
                (layer.in_proj.weight, past.weight),
                (layer.in_proj.bias, past.bias),
                (layer.params, past.params),
            ):
                if p.requires_grad:
                    p.grad += g.view_as(p)
            rtrl_update(S, u, x, layer.params, h.detach(), cell=layer.cell, reset=reset)

    def feed(self, u: Tensor, target: Tensor, reset: Tensor | None = None) -> Fed:
        """:meth:`accumulate` from a gradient of zero, then a step of the optimizer."""
        self.optimizer.zero_grad(set_to_none=True)
        fed = self.accumulate(u, target, reset)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        for layer in self.layers:
            layer.clip()
        return fed

    @torch.no_grad()
    def predict(self, u: Tensor, reset: Tensor | None = None) -> Tensor:
        """The outputs of a chunk; nothing is learned and the stream stays where it is."""
        states = self._h or [None] * len(self.layers)
        y = u
        for layer, h in zip(self.layers, states, strict=True):
            y, _ = layer(y, h, reset)
        return self.readout(y)

    # ---- files ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next chunk depends on: ``tensors`` by name, and ``about``, which JSON
        can hold."""
        tensors = {f"layers.{k}": v for k, v in self.layers.state_dict().items()}
        tensors |= {f"readout.{k}": v for k, v in self.readout.state_dict().items()}
        optimizer = self.optimizer.state_dict()
        numbers: dict[str, dict[str, Any]] = {}
        for i, values in optimizer["state"].items():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{i}.{name}"] = value
                else:
                    numbers.setdefault(str(i), {})[name] = value
        for i, h in enumerate(self._h):
            tensors[f"state.{i}"] = h
        for i, S in enumerate(self._S):
            tensors |= {f"sensitivities.{i}.{k}": v for k, v in S._asdict().items()}
        about = {
            "chunks": self.chunks,
            "algorithm": self.algorithm,
            "cells": [layer.cell for layer in self.layers],
            "groups": optimizer["param_groups"],
            "numbers": numbers,
        }
        return {"tensors": tensors, "about": about}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Goes on where the learner of a :meth:`state_dict` was, with its bits.

        Raises:
            CheckpointError: it is of another learner.
        """
        tensors, about = saved["tensors"], saved["about"]
        where = Path(TENSORS)
        cells = [layer.cell for layer in self.layers]
        if (about.get("algorithm"), about.get("cells")) != (self.algorithm, cells):
            raise CheckpointError(
                f"{ABOUT}: is of {about.get('algorithm')} with {_files.shown(about.get('cells'))}, "
                f"not of {self.algorithm} with {cells}"
            )
        streams = {k: v for k, v in tensors.items() if k.startswith(("state.", "sensitivities."))}
        batch = next((len(v) for k, v in streams.items() if k == "state.0" and v.dim()), None)
        modules = {"layers": self.layers, "readout": self.readout}
        wanted = {
            f"{part}.{name}": tuple(x.shape)
            for part, module in modules.items()
            for name, x in module.state_dict().items()
        }
        if batch is not None:
            wanted |= self._stream_shapes(batch)
        moments = {k: v for k, v in tensors.items() if k.startswith("optimizer.")}
        shapes = {k: ("", tuple(v.shape)) for k, v in tensors.items() if k not in moments}
        _files.compare(where, wanted, shapes, dtypes=("",))
        for part, module in modules.items():
            module.load_state_dict(
                {
                    k.removeprefix(f"{part}."): v
                    for k, v in tensors.items()
                    if k.startswith(f"{part}.")
                }
            )
        try:
            self.optimizer.load_state_dict(self._optimizer_state(moments, about))
            self.chunks = int(about["chunks"])
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{ABOUT}: cannot be resumed: {error!r:.200}") from None
        self._h, self._S = [], []
        if batch is not None:
            self.begin(batch)
            for name, to in self._streams().items():
                to.copy_(tensors[name])

    def _streams(self) -> dict[str, Tensor]:
        found = {f"state.{i}": h for i, h in enumerate(self._h)}
        for i, S in enumerate(self._S):
            found |= {f"sensitivities.{i}.{k}": v for k, v in S._asdict().items()}
        return found

    def _stream_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Without making the tensors, whose size a file may have invented."""
        found = {}
        for i, layer in enumerate(self.layers):
            found[f"state.{i}"] = (batch, *layer.initial_state(0).shape[1:])
            if self.algorithm == "rtrl":
                for k, v in layer.initial_sensitivities(0)._asdict().items():
                    found[f"sensitivities.{i}.{k}"] = (batch, *v.shape[1:])
        return found

    def _optimizer_state(self, moments: dict[str, Tensor], about: dict[str, Any]) -> dict[str, Any]:
        now = self.optimizer.state_dict()["param_groups"]
        groups = []
        for own, saved in zip(now, about["groups"], strict=True):
            if own["params"] != saved["params"]:
                raise ValueError("the optimizer has other parameters")
            # JSON has lists where there were tuples.
            groups.append(
                {
                    k: tuple(v) if isinstance(v, list) and isinstance(own.get(k), tuple) else v
                    for k, v in saved.items()
                }
            )
        state: dict[int, dict[str, Any]] = {
            int(i): dict(values) for i, values in about["numbers"].items()
        }
        for name, value in moments.items():
            _, i, what = name.split(".", 2)
            state.setdefault(int(i), {})[what] = value
        shapes = dict(
            enumerate(tuple(p.shape) for g in self.optimizer.param_groups for p in g["params"])
        )
        for i, values in state.items():
            for what, value in values.items():
                if isinstance(value, Tensor) and value.dim() and tuple(value.shape) != shapes[i]:
                    raise ValueError(f"{what} {i} has shape {tuple(value.shape)}, not {shapes[i]}")
        return {"state": state, "param_groups": groups}

    def save(self, folder: Path | str, *, keep: int = 2, **notes: Any) -> Path:
        """Writes a checkpoint that a crash cannot damage, and deletes all but the newest few.

        Args:
            folder: where the checkpoints are.
            keep: how many stay.
            notes: anything that JSON can hold, which :meth:`load` returns.

        Returns:
            The checkpoint, a folder in it.

        Raises:
            OSError: it could not be written; earlier ones are as they were.
        """
        from recurra.train import checkpoint

        saved = self.state_dict()

        def write(to: Path) -> None:
            _files.write_tensors(to / TENSORS, saved["tensors"], {})
            _files.write_json(to / ABOUT, saved["about"] | {"notes": notes})

        return checkpoint.save(Path(folder), self.chunks, write, keep=keep)

    def load(self, folder: Path | str) -> dict[str, Any]:
        """Goes on from the newest whole checkpoint that :meth:`save` made in a folder.

        Returns:
            The notes it was saved with.

        Raises:
            FileNotFoundError: there is none.
            CheckpointError: it is damaged or of another learner.
        """
        newest = find(folder)
        about = _files.read_json(newest / ABOUT)
        with _files.open_tensors(newest / TENSORS) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.load_state_dict({"tensors": tensors, "about": about})
        notes = about.get("notes", {})
        return notes if isinstance(notes, dict) else {}


def find(folder: Path | str) -> Path:
    """The newest whole checkpoint in a folder.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: none of them is whole.
    """
    from recurra.train import checkpoint

    newest = checkpoint.newest(Path(folder))
    if newest is None:
        raise FileNotFoundError(2, "no checkpoint of a learner", str(folder))
    return newest
