"""Exports draw what eager draws, for any number of rows; what differs is not kept."""

import importlib

import pytest
import torch

from flowspace import FlowMap, LinearSchedule, MatchedStatistic, RunError

pytest.importorskip("diffusers")
export = importlib.import_module("flowspace.vision.export")
SMALL = {
    "channels": 4,
    "grid": 4,
    "patch": 2,
    "depth": 2,
    "width": 32,
    "heads": 2,
    "class_tokens": 2,
    "time_tokens": 2,
}


def generator(**settings):
    from flowspace.vision import CrossFlowGenerator

    torch.manual_seed(0)
    network = CrossFlowGenerator(**(SMALL | {"classes": 5} | settings))
    torch.nn.init.normal_(network.head.weight, std=0.1)
    return network.eval()


@pytest.mark.parametrize(
    "settings", [{}, {"mlp": "gelu"}, {"condition": "t,s"}, {"classes": 0}, {"grid": (2, 6)}]
)
def test_torch_export_draws_what_eager_draws(tmp_path, settings):
    network = generator(**settings)
    assert export.TorchExport()(network, tmp_path / "g.pt2") <= 1e-5
    for rows in (1, 7):
        inputs = export.OneStep(network).inputs(rows)
        found = torch.export.load(tmp_path / "g.pt2").module()(*inputs)
        torch.testing.assert_close(found, export.OneStep(network)(*inputs), rtol=0, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["g.pt2"]


@pytest.mark.parametrize("settings", [{}, {"mlp": "gelu", "condition": "t-s"}, {"classes": 0}])
def test_onnx_draws_what_eager_draws(tmp_path, settings):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network = generator(**settings)
    assert export.Onnx()(network, tmp_path / "g.onnx") <= 1e-4
    inputs = export.OneStep(network).inputs(6)
    torch.testing.assert_close(
        export.Onnx().run(tmp_path / "g.onnx", inputs),
        export.OneStep(network)(*inputs),
        rtol=0,
        atol=1e-4,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["g.onnx"]


def test_one_step_is_the_flow_map_from_noise_to_data():
    network = generator()
    noise, labels = export.OneStep(network).inputs(3)
    with torch.no_grad():
        sample = FlowMap(network, LinearSchedule(), MatchedStatistic()).sample(
            noise, cond={"labels": labels}
        )
        torch.testing.assert_close(export.OneStep(network)(noise, labels), sample)


def test_a_program_that_differs_is_not_kept(tmp_path):
    class Wrong(export.TorchExport):
        def run(self, path, inputs):
            return super().run(path, inputs) + 0.1

    with pytest.raises(RunError, match=r"differs from eager by 0\.1"):
        Wrong()(generator(), tmp_path / "g.pt2")
    assert not list(tmp_path.iterdir())
