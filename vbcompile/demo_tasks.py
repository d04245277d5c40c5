"""The demo's two tasks: a model, its input, one timed step, and everything about its answers that is compared."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from vbcompile.demo_models import LoadedModel, mean_embedding

Backend = str | Callable[..., Any]


@dataclass(frozen=True)
class Scale:
    """How much the demo does.

    Attributes:
        sentences, sentence_tokens: shape of the encoder's batch.
        window, windows: tokens in a text window, and number of windows, of the language model.
        new_tokens: length of the greedy continuation.
        repeats: timed steps.
        layerwise: compile the language model layer by layer (one graph serves all layers) instead of as a whole.
    """

    sentences: int
    sentence_tokens: int
    window: int
    windows: int
    new_tokens: int
    repeats: int
    layerwise: bool


ON_CPU = Scale(sentences=32, sentence_tokens=64, window=128, windows=4, new_tokens=12, repeats=5, layerwise=False)
ON_ACCELERATOR = Scale(
    sentences=256, sentence_tokens=64, window=1024, windows=8, new_tokens=48, repeats=20, layerwise=False
)
QUICK = Scale(sentences=16, sentence_tokens=48, window=64, windows=4, new_tokens=8, repeats=3, layerwise=True)


@dataclass(frozen=True)
class Outcome:
    """What a model computed in one column, for comparison with eager's.

    Attributes:
        output: float64 on the CPU; hidden states of the real tokens (tokens, width), or logits of the first window
            (window, vocabulary).
        sample: a line for people.
        embeddings: (sentences, width), unit length, float64 on the CPU; None for a language model.
        tokens: greedy continuation.
        margins: for each of these tokens, the difference of the two largest logits.
        perplexity: over all windows; None for an encoder.
    """

    output: torch.Tensor
    sample: str
    embeddings: torch.Tensor | None = None
    tokens: tuple[int, ...] = ()
    margins: tuple[float, ...] = ()
    perplexity: float | None = None


class Task(Protocol):
    """A model with its input. The argument ``model`` is that model: itself, compiled, or a copy in another dtype."""

    name: str
    description: str
    model: Any

    def step(self, model: Any) -> torch.Tensor:
        """One timed step: the model's first output."""

    def output(self, model: Any) -> torch.Tensor:
        """:attr:`Outcome.output`."""

    def outcome(self, model: Any) -> Outcome:
        """Everything that is compared."""

    def compiled(self, backend: Backend) -> Any:
        """The model through ``torch.compile``."""


class EmbeddingTask:
    """A sentence encoder on a padded batch of sentences."""

    def __init__(self, loaded: LoadedModel, sentences: Sequence[str], tokens: int) -> None:
        self.name = "all-MiniLM-L6-v2"
        self.description = f"{len(sentences)} sentences padded to {tokens} tokens"
        self.model, tokenizer = loaded
        self.sentences = list(sentences)
        batch = tokenizer(self.sentences, padding="max_length", max_length=tokens, truncation=True, return_tensors="pt")
        self.inputs = {name: value.to(self.model.device) for name, value in batch.items()}

    def step(self, model: Any) -> torch.Tensor:
        device = next(model.parameters()).device
        return model(**{name: value.to(device) for name, value in self.inputs.items()}).last_hidden_state

    def output(self, model: Any) -> torch.Tensor:
        return self._hidden(model)[self._mask.bool()]

    def outcome(self, model: Any) -> Outcome:
        hidden = self._hidden(model)
        embeddings = mean_embedding(hidden, self._mask)
        return Outcome(hidden[self._mask.bool()], self._closest(embeddings), embeddings)

    def compiled(self, backend: Backend) -> Any:
        return torch.compile(self.model, backend=backend)

    def _hidden(self, model: Any) -> torch.Tensor:
        return self.step(model).double().cpu()

    @property
    def _mask(self) -> torch.Tensor:
        return self.inputs["attention_mask"].cpu()

    def _closest(self, embeddings: torch.Tensor) -> str:
        similarity = (embeddings @ embeddings.T).fill_diagonal_(-1)
        pair = sorted(divmod(int(similarity.argmax()), len(self.sentences)))
        return f"closest pair ({similarity.max():.2f}): " + " / ".join(self.sentences[index] for index in pair)


class ContinuationTask:
    """A causal language model: windows of text to score, and a prompt to continue greedily.

    The continuation runs in a buffer of the same length as a window, padded on the right, where causal attention never
    looks: one shape, hence one compilation.
    """

    def __init__(self, loaded: LoadedModel, text: str, prompt: str, scale: Scale) -> None:
        self.name = "SmolLM2-135M"
        self.description = f"forward pass over {scale.window} tokens"
        if scale.layerwise:
            self.description += ", compiled layer by layer"
        self.model, self.tokenizer = loaded
        self.scale = scale
        ids = self.tokenizer(text, return_tensors="pt").input_ids[0, : scale.window * scale.windows]
        self.windows = ids.reshape(scale.windows, 1, scale.window).to(self.model.device)
        self.prompt = self.tokenizer(prompt).input_ids

    def step(self, model: Any) -> torch.Tensor:
        return self._logits(model, self.windows[0])

    def output(self, model: Any) -> torch.Tensor:
        return self.step(model)[0].double().cpu()

    def outcome(self, model: Any) -> Outcome:
        losses = []
        for window in self.windows:
            logits = self._logits(model, window)[0, :-1].double().cpu()
            losses.append(nn.functional.cross_entropy(logits, window[0, 1:].cpu()))
        tokens, margins = self._continue(model)
        return Outcome(
            output=self.output(model),
            sample=f"continuation: {self.tokenizer.decode([*self.prompt, *tokens])!r}",
            tokens=tokens,
            margins=margins,
            perplexity=torch.stack(losses).mean().exp().item(),
        )

    def compiled(self, backend: Backend) -> Any:
        if not self.scale.layerwise:
            return torch.compile(self.model, backend=backend)
        tensors = [*self.model.parameters(), *self.model.buffers()]
        model = copy.deepcopy(self.model, {id(tensor): tensor for tensor in tensors})  # new modules, the same weights
        for layer in model.model.layers:
            layer.compile(backend=backend)
        return model

    def _logits(self, model: Any, ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids.to(next(model.parameters()).device), use_cache=False).logits

    def _continue(self, model: Any) -> tuple[tuple[int, ...], tuple[float, ...]]:
        buffer = torch.full_like(self.windows[0], self.tokenizer.pad_token_id)
        length = len(self.prompt)
        buffer[0, :length] = torch.tensor(self.prompt)
        tokens, margins = [], []
        for position in range(length, length + self.scale.new_tokens):
            values, indices = self._logits(model, buffer)[0, position - 1].topk(2)
            buffer[0, position] = indices[0]
            tokens.append(int(indices[0]))
            margins.append(float(values[0] - values[1]))
        return tuple(tokens), tuple(margins)
