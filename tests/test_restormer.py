"""The teacher's architecture, against the reference implementation and the published sizes."""

import pytest
import torch

from Restormer.basicsr.models.archs.restormer_arch import Restormer

COMPACT = {"dim": 16, "num_blocks": (1, 2, 1, 1), "num_refinement_blocks": 2}


def test_the_published_network_has_the_published_number_of_parameters():
    with torch.device("meta"):
        restormer = Restormer()
    assert sum(parameter.numel() for parameter in restormer.parameters()) == 26_126_644


@pytest.mark.parametrize(
    "options",
    [
        {},
        COMPACT,
        COMPACT | {"LayerNorm_type": "BiasFree", "bias": True, "heads": (1, 1, 2, 4)},
        COMPACT | {"dual_pixel_task": True, "inp_channels": 6},
    ],
    ids=["whole", "compact", "bias-free norm", "dual pixel"],
)
def test_outputs_are_those_of_the_reference_implementation(options):
    extra = pytest.importorskip("spandrel_extra_arches", reason="pip install spandrel-extra-arches")
    extra.install(ignore_duplicates=True)
    from spandrel_extra_arches.architectures.Restormer.__arch import restormer_arch

    torch.manual_seed(0)
    ours = Restormer(**options).eval()
    reference = restormer_arch.Restormer(**options).eval()
    for parameter in reference.parameters():  # temperatures and norms at 1 would hide a mix-up
        parameter.data += 0.1 * torch.randn_like(parameter) * parameter.abs().mean()
    ours.load_state_dict(reference.state_dict(), strict=True)
    reference.load_state_dict(ours.state_dict(), strict=True)
    picture = torch.rand(1, options.get("inp_channels", 3), 48, 40)
    with torch.no_grad():
        assert torch.allclose(ours(picture), reference(picture), atol=1e-5)


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="multiples of 8, not 20x16"):
        Restormer(**COMPACT)(torch.zeros(1, 3, 16, 20))
