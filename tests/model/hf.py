"""transformers' Qwen3-Next with the weights of our modules."""

from dataclasses import replace

from torch import Tensor, nn
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from model.config import ModelConfig
from model.hf import config as hf_config
from model.hf import names, pieces

Weights = dict[str, Tensor]


def config(shape: ModelConfig, vocab_size: int = 64, max_length: int = 4096) -> Qwen3NextConfig:
    """Its configuration."""
    values = hf_config.to_hf(replace(shape, vocab_size=vocab_size), False, 0.001, max_length, "float32", None)
    return Qwen3NextConfig(**values, attn_implementation="eager")


def theirs(own: Weights, pieces) -> Weights:
    """Our weights under their names."""
    return {
        part.name: tensor
        for piece in pieces
        for part, tensor in zip(piece.parts, piece.to_theirs(own[piece.ours]), strict=True)
    }


def layer_weights(
    module: nn.Module, rules: tuple[names.Rule, ...], shape: ModelConfig, name: str, their_name: str
) -> Weights:
    """The weights of one of our modules, known inside a layer by a name, as those of one of theirs."""
    inside = tuple(rule for rule in rules if rule.ours.startswith(name))
    own = {name + key: weight for key, weight in module.named_parameters()}
    return {
        key.removeprefix(their_name): weight
        for key, weight in theirs(own, pieces.layer_pieces(inside, shape, stacked=True)).items()
    }


def trunk_weights(network: nn.Module, shape: ModelConfig, vocab_size: int) -> Weights:
    """The whole trunk of a network."""
    every = pieces.pieces(replace(shape, vocab_size=vocab_size), mtp=False, stacked=lambda layer: True)
    return theirs(dict(network.named_parameters()), every)


def load(module: nn.Module, weights: Weights) -> nn.Module:
    """Puts converted weights into a module of theirs; every one of its parameters must be there."""
    module.load_state_dict({name: weight.detach() for name, weight in weights.items()}, strict=True)
    return module.eval()


def causal_lm(network: nn.Module, shape: ModelConfig, vocab_size: int) -> Qwen3NextForCausalLM:
    """The whole model for a whole model's weights."""
    return load(Qwen3NextForCausalLM(config(shape, vocab_size)), trunk_weights(network, shape, vocab_size))
