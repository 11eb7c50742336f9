"""EMA against its formula by hand, and what happens to the module that it is applied to."""

import pytest
import torch
from torch import nn

from lzn_dist.models import EMA


def module() -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.Linear(4, 2))
    network[0].bias.requires_grad_(False)
    return network


@torch.no_grad()
def move(network: nn.Module, step: int) -> None:
    for parameter in network.parameters():
        parameter += torch.sin(torch.arange(parameter.numel()) + float(step)).reshape(parameter.shape)


def test_update_follows_the_formula_by_hand() -> None:
    network = module()
    ema = EMA(network, decay=0.35)
    assert list(ema.shadow) == ["0.weight", "1.weight", "1.bias", "2.weight", "2.bias"]  # the frozen bias is not there
    expected = {name: network.get_parameter(name).double().detach() for name in ema.shadow}
    # the warm-up (1 + n)/(10 + n): 2/11, 3/12, 4/13, 5/14, then above 0.35
    for step, decay in enumerate((2 / 11, 3 / 12, 4 / 13, 0.35, 0.35)):
        move(network, step)
        ema.update(network)
        for name, average in expected.items():
            expected[name] = decay * average + (1 - decay) * network.get_parameter(name).double().detach()
    assert ema.num_updates == 5
    for name, average in expected.items():
        assert ema.shadow[name].dtype == torch.float32
        torch.testing.assert_close(ema.shadow[name].double(), average, rtol=1e-6, atol=1e-6)


def test_applied_swaps_and_restores_even_after_an_error() -> None:
    network = module()
    ema = EMA(network, 0.9)
    move(network, 1)
    ema.update(network)
    own = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(RuntimeError, match="inside"), ema.applied(network):
        for name, shadow in ema.shadow.items():
            assert torch.equal(network.get_parameter(name), shadow)
            assert not torch.equal(own[name], shadow)
        assert torch.equal(network[0].bias, own["0.bias"])
        raise RuntimeError("inside")
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, own[name])


def test_state_goes_round_and_continues_equally() -> None:
    network = module()
    ema = EMA(network, 0.99)
    move(network, 0)
    ema.update(network)
    state = {**ema.state_dict(), "shadow": {name: s.clone() for name, s in ema.shadow.items()}}
    other = EMA(module(), 0.5)
    other.load_state_dict(state)
    assert (other.decay, other.num_updates) == (0.99, 1)
    move(network, 1)
    ema.update(network)
    other.update(network)
    assert all(torch.equal(other.shadow[name], shadow) for name, shadow in ema.shadow.items())
    target = module()
    ema.copy_to(target)
    assert torch.equal(target[2].weight, ema.shadow["2.weight"])


def test_low_precision_parameters_have_float32_averages() -> None:
    network = module().bfloat16()
    ema = EMA(network, 0.999)
    for step in range(3):
        move(network, step)
        ema.update(network)
    assert all(shadow.dtype == torch.float32 for shadow in ema.shadow.values())
    ema.copy_to(network)
    assert torch.equal(network[2].weight, ema.shadow["2.weight"].bfloat16())


def test_a_mapping_does_in_place_of_a_module() -> None:
    network = module()
    by_module, by_mapping = EMA(network, 0.9), EMA({"2.weight": network[2].weight.detach().clone()}, 0.9)
    move(network, 0)
    by_module.update(network)
    by_mapping.update({"2.weight": network[2].weight.detach().clone()})
    assert torch.equal(by_mapping.shadow["2.weight"], by_module.shadow["2.weight"])


def test_errors_name_what_differs() -> None:
    ema = EMA(module(), 0.9)
    with pytest.raises(ValueError, match="decay"):
        EMA(module(), 1.0)
    with pytest.raises(ValueError, match=r"2\.weight"):
        ema.update(nn.Sequential(*module()[:2]))
    state = ema.state_dict()
    with pytest.raises(ValueError, match="unknown parameters, among them 9"):
        ema.load_state_dict({**state, "shadow": {**state["shadow"], "9": torch.zeros(1)}})
    with pytest.raises(ValueError, match=r"0\.weight has shape \[1\]"):
        ema.load_state_dict({**state, "shadow": {**state["shadow"], "0.weight": torch.zeros(1)}})
