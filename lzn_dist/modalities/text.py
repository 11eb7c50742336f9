"""Text: encoded by any network from the tokens of a caption to D numbers, written word by word from a latent."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lzn_dist.data import Batch, CaptionReader, MemberReader, Tokenizer
from lzn_dist.data.captions import NO_TOKEN
from lzn_dist.keyed_random import fold, uniform
from lzn_dist.modalities.base import Keys, Modality, Network, shared_mean


class Text(Modality):
    """Tokens int64 [b, l], negative behind a caption's end (and everywhere where there is none)."""

    name: ClassVar[str] = "text"

    def given(self) -> dict[str, Any]:
        return {"vocabulary": self.config.data.vocabulary, "text_length": self.config.data.text_length}

    def reader(self, tokenizer: Tokenizer | None) -> MemberReader | None:
        data = self.config.data
        assert tokenizer is not None
        return CaptionReader(tokenizer, data.text_length, self.config.seed, data.partial)

    def views(self, batch: Batch, index: Tensor, count: int, augmented: bool) -> tuple[Tensor, ...]:
        """One of each sample's captions, and a column more than fits, which is there where it was longer."""
        tokens = batch.members[self.name]
        longest = int((tokens >= 0).sum(1).amax())  # on the host still
        return (tokens[:, : max(8, -(-longest // 8) * 8)].to(index.device, non_blocking=True),)

    def present(self, samples: Tensor) -> Tensor | None:
        return samples[:, 0] >= 0

    def same(self, samples: Tensor) -> Tensor | None:
        """A hash of the tokens, whatever is behind their end."""
        places = torch.arange(samples.shape[1], device=samples.device)
        return torch.where(samples >= 0, fold(samples, places), 0).sum(1)

    def watched(self, samples: Tensor) -> dict[str, Tensor]:
        length = self.config.data.text_length
        cut = samples[:, length:] >= 0 if samples.shape[1] > length else torch.zeros_like(samples[:, :1])
        return {"captions_cut": cut.any(1).float().mean()}

    def encode(self, encoder: Network, samples: Tensor, key: Tensor) -> Tensor:
        return encoder(samples[:, : self.config.data.text_length], key=key)

    def decoding_loss(
        self, decoder: Network, samples: Tensor, latents: Tensor, labels: Tensor | None, keys: Keys,
        shares: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The cross-entropy of the next token, a mean over a caption's tokens and its end (where it was not cut), and
        over samples."""
        tokens = samples[:, : self.config.data.text_length]
        logits = decoder(tokens, latents, labels=labels, key=keys("dropout/decoder"))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        length = (samples >= 0).sum(1, keepdim=True)
        places = torch.arange(logits.shape[1], device=samples.device)
        targets = torch.cat((tokens, tokens.new_full((len(tokens), 1), NO_TOKEN)), 1)
        targets = torch.where(places == length, logits.shape[2] - 1, targets)
        counted = targets >= 0
        each = F.cross_entropy(logits.transpose(1, 2), targets.clamp(min=0), reduction="none") * counted
        return shared_mean(each.sum(1) / counted.sum(1).clamp(min=1), shares)

    @torch.no_grad()
    def write(
        self, decoder: Any, latents: Tensor, labels: Tensor | None, keys: Tensor, *,
        temperature: float = 0.0, top_p: float = 1.0, beams: int = 1,
    ) -> Tensor:  # fmt: skip
        """Captions int64 [b, l] under latents [b, D], negative behind their ends; l: text_length at most.

        temperature 0 takes the likeliest token each time, or with beams > 1 looks for the likeliest caption (its mean
        log-probability a token); above, tokens are drawn from softmax(logits / temperature), of those that have top_p
        of the probability together; keys: int64 [b], of what is drawn.
        """
        if beams > 1:
            if temperature > 0:
                raise ValueError("beams look for the likeliest caption: temperature must be 0 with them")
            return self._search(decoder, latents, labels, beams)
        logits, past = decoder.begin(latents, labels)
        end, written = logits.shape[1] - 1, []
        ended = torch.zeros(len(latents), dtype=torch.bool, device=latents.device)
        for place in range(self.config.data.text_length):
            token = logits.argmax(1) if temperature == 0 else _drawn(logits / temperature, top_p, fold(keys, place))
            ended = ended | (token == end)
            written.append(token.masked_fill(ended, NO_TOKEN))
            if bool(ended.all()):
                break
            logits, past = decoder.extend(token.clamp(max=end - 1), past)
        return torch.stack(written, 1) if written else latents.new_zeros(0, 0, dtype=torch.int64)

    def _search(self, decoder: Any, latents: Tensor, labels: Tensor | None, beams: int) -> Tensor:
        """Beam search: the caption of the largest mean log-probability a token, its end counted."""
        count, device = len(latents), latents.device
        logits, past = decoder.begin(latents, labels)
        end = logits.shape[1] - 1
        beams = min(beams, end + 1)
        scores, token = logits.float().log_softmax(1).topk(beams, 1)
        rows = torch.arange(count, device=device)[:, None]
        past = [tuple(part.repeat_interleave(beams, 0) for part in own) for own in past]
        ended = token == end
        written = token.masked_fill(ended, NO_TOKEN)[..., None]
        length = torch.ones_like(scores)
        for _ in range(1, self.config.data.text_length):
            if bool(ended.all()):
                break
            logits, past = decoder.extend(token.clamp(max=end - 1).flatten(), past)
            steps = logits.float().log_softmax(1).unflatten(0, (count, beams))
            # one that has ended goes on as it is, once
            stay = torch.full_like(steps, -torch.inf)
            stay[..., end] = 0.0
            steps = torch.where(ended[..., None], stay, steps)
            longer = length + (~ended).to(length.dtype)
            best = ((scores[..., None] + steps) / longer[..., None]).flatten(1).topk(beams, 1).indices
            parent, token = best // (end + 1), best % (end + 1)
            scores = (scores[..., None] + steps).flatten(1).gather(1, best)
            length, ended = longer.gather(1, parent), ended.gather(1, parent) | (token == end)
            new = token.masked_fill(ended, NO_TOKEN)[..., None]
            written = torch.cat((written[rows, parent], new), 2)
            flat = (rows * beams + parent).flatten()
            past = [tuple(part[flat] for part in own) for own in past]
        return written[rows[:, 0], (scores / length).argmax(1)]


def _drawn(logits: Tensor, top_p: float, keys: Tensor) -> Tensor:
    """A token int64 [b] of each row's distribution, of the likeliest that have top_p of it together."""
    chances, order = logits.float().softmax(1).sort(1, descending=True)
    before = chances.cumsum(1) - chances
    chances = chances.masked_fill(before >= top_p, 0.0)
    total = chances.cumsum(1)
    place = (total <= uniform(keys)[:, None] * total[:, -1:]).sum(1).clamp(max=logits.shape[1] - 1)
    return order.gather(1, place[:, None]).squeeze(1)
