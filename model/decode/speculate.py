"""Decoding with drafts: the MTP layer proposes tokens, and one pass of the trunk checks all of them at once.

A round begins with one token that is certain but not yet read, and its draft of N further ones. The trunk reads all
1 + N; the tokens that it would choose itself confirm the draft up to the first difference, and that choice is the next
certain token. So each round yields 1 to 1 + N tokens, and they are those of decoding one by one (Leviathan, Kalman,
Matias, "Fast Inference from Transformers via Speculative Decoding", 2023): greedily the very same, and where ``pick``
draws them, drawn from the same distribution, as a draft is one fixed token.

Shape suffixes: R rows, L tokens of a prompt, N tokens of a draft, H hidden, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from model.decode.decode import Decoder
from model.network import LanguageModel


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token: [..., V] -> [...]."""
    return logits.argmax(dim=-1)


class Speculator:
    """Continues several texts at once.

    Args:
        network: the whole model, without pipeline stages.
        prompts: at least one token each. tokens: how many a text may get beyond its prompt.
        draft: tokens that the MTP layer proposes a round; 0 decodes one by one.
        vocab_size: tokens that there are; the rows of the head behind them only fill it up.
        pick: how a token is chosen from logits [..., V].
    """

    def __init__(
        self,
        network: LanguageModel,
        prompts: list[list[int]],
        tokens: int,
        draft: int,
        vocab_size: int,
        pick: Callable[[Tensor], Tensor] = greedy,
    ):
        self.draft, self.vocab_size, self.pick = draft, vocab_size, pick
        self.device = network.head_weight.device
        count_R = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        longest = int(count_R.max())
        padded = [prompt + [0] * (longest - len(prompt)) for prompt in prompts]
        tokens_RL = torch.tensor(padded, device=self.device)
        self.rows = torch.arange(len(prompts), device=self.device)
        # A text that is finished stays where it is, one round beyond its last token at the most.
        self.decoder = Decoder(network, len(prompts), longest + tokens + 2 * (draft + 1))
        states_RLH = self.decoder.read(tokens_RL, count_R)
        self.decoder.keep(count_R)
        # What follows each text and is not read yet: [R], and the draft of what follows then: [R, N].
        self.next_R = self._choose(states_RLH[self.rows, count_R - 1])
        following_RL = torch.cat([tokens_RL[:, 1:], tokens_RL[:, :1]], dim=1)
        following_RL[self.rows, count_R - 1] = self.next_R
        self.draft_RN = self._propose(states_RLH, following_RL, torch.zeros_like(count_R), count_R - 1)

    def _choose(self, states: Tensor) -> Tensor:
        return self.pick(self.decoder.logits(states)[..., : self.vocab_size])

    def _propose(self, states_RLH: Tensor, following_RL: Tensor, begin_R: Tensor, last_R: Tensor) -> Tensor:
        """The draft [R, N] behind the block that begins at ``begin_R`` and of which ``last_R`` is the last that counts.

        The first step reads the whole block, so that its keys are there for all later drafts.
        """
        if not self.draft:
            return following_RL[:, :0]
        states = self.decoder.predict(states_RLH, following_RL, begin_R)[self.rows, last_R]
        proposed = [greedy(self.decoder.logits(states)[..., : self.vocab_size])]
        for step in range(1, self.draft):
            states = self.decoder.predict(states[:, None], proposed[-1][:, None], begin_R + last_R + step)[:, 0]
            proposed.append(greedy(self.decoder.logits(states)[..., : self.vocab_size]))
        return torch.stack(proposed, dim=1)

    def advance(self, active_R: Tensor) -> tuple[Tensor, Tensor]:
        """One round for the texts that are ``active_R`` (bool); the others stay as they are.

        Returns:
            [R, 1 + N] the tokens that follow `next_R`, of which the first 1 + accepted are certain, and [R] how many
            tokens of the draft were accepted.
        """
        block = torch.cat([self.next_R[:, None], self.draft_RN], dim=1)
        begin_R = self.decoder.trunk.length_R
        states_RNH = self.decoder.read(block)
        chosen = self._choose(states_RNH)
        right = (chosen[:, :-1] == self.draft_RN).long()
        accepted_R = right.cumprod(dim=1).sum(dim=1)
        self.decoder.keep(torch.where(active_R, accepted_R + 1, 0))
        self.draft_RN = self._propose(states_RNH, chosen, begin_R, accepted_R)
        self.next_R = chosen[self.rows, accepted_R]
        return chosen, accepted_R
