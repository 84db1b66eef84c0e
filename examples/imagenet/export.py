"""Write a run's generator as a program that needs no flowspace, checked against eager.

python examples/imagenet/export.py RUN FILE

The suffix of FILE says which: .pt2 (torch.export) or .onnx (needs the extra 'onnx').
"""

import argparse
from pathlib import Path

import settings


def main() -> None:
    """Export the generator of a run, and say how far it is from eager."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the folder that train.py made")
    parser.add_argument("file", type=Path, help="ends in .pt2 or .onnx")
    options = parser.parse_args()
    file = options.file
    if file.suffix not in (".pt2", ".onnx"):
        raise settings.SettingsError(f"got {file}; write a file that ends in .pt2 or .onnx")
    config = settings.of_run(options.run)

    import ship  # with torch, which a wrong folder need not wait for

    from flowspace.vision.export import Onnx, TorchExport

    export: Onnx | TorchExport = TorchExport()
    if file.suffix == ".onnx":
        export = Onnx()
    generator = ship.generator_of_run(config).eval()
    apart = export(generator, file)
    print(f"{file}: differs from eager by at most {apart:.1g}")


if __name__ == "__main__":
    settings.run_program(main)
