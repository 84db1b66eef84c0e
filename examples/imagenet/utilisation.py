"""The share of a device's peak that a training reaches: assumed, or measured by a profiled run."""

import json
from dataclasses import dataclass
from pathlib import Path

from settings import SettingsError

__all__ = ["NOT_RUN", "Utilisation", "measured"]

NOT_RUN = "not run here"
"""What stands where a number would have to be measured."""


@dataclass(frozen=True)
class Utilisation:
    """The share of a device's peak that a training reaches; assumed, unless a device is named.

    Attributes:
        share: FLOPs as they are counted here, over the time and the device's peak.
        device: on which it was measured.
    """

    share: float = 0.4
    device: str | None = None

    def __str__(self) -> str:
        if self.device is None:
            return f"{100 * self.share:.3g} %, assumed; {NOT_RUN}"
        return f"{100 * self.share:.3g} %, measured on {self.device}"


def measured(run: Path) -> Utilisation:
    """Read the share that a profiled run reached, from the ``profile.json`` in its folder.

    Raises:
        SettingsError: if there is none, or it does not say it.
    """
    path = run / "profile.json"
    try:
        profile = json.loads(path.read_text())
        share = float(profile["utilisation"])
        device = str(profile["device"])
    except OSError as error:
        raise SettingsError(
            f"got --run {run}, but {path} cannot be read ({error.strerror}); "
            "write the folder of a run of train.py --profile, or leave --run out"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"{path} says no utilisation and device ({error!r}): "
            "train.py --profile knows it on a card whose peak is known; "
            "leave --run out to assume one"
        ) from None
    if not 0 < share <= 1:
        raise SettingsError(
            f"{path} says utilisation = {share}; it is a share of the peak, above 0 and at most 1"
        )
    return Utilisation(share, device)
