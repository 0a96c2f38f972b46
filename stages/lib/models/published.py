"""What a recipe says of the model that is published: its licence, the number format of its weights. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pipeline.settings.licenses import License
from pipeline.settings.strict import Strict

PublishedDtype = Literal["fp32", "bf16", "fp16"]


class PublishedParams(Strict):
    """What every stage's recipe may say that publishes a model."""

    license: License | None = None
    """The licence that the model's README.md names: `apache-2.0`, as the hub calls it, or `{name: my-license, link: https://...}`. null: that of the model that it was made from, where its README.md names one. It is a part of the artifact, so another licence makes it anew: to change one afterwards, edit README.md in the copy that you upload."""
