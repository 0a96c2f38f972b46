"""The licence of what is published, as the Hugging Face hub names it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from pipeline.errors import did_you_mean
from pipeline.settings.strict import Strict

LICENSES = frozenset(
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m "
    "afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 "
    "cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 "
    "cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 "
    "cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 "
    "lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl "
    "openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license "
    "fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown".split()
)
"""The identifiers that the hub's page on licences lists, but for `other`, which wants a name. A card with another is
refused there."""


class NamedLicense(Strict):
    """A licence: one that the hub lists, or another with its link."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.+-]{0,95}$")
    """What the hub calls it (apache-2.0, mit, llama3.1, ...), or of a licence that it does not list, a name in lower-case letters, digits, `.` and `-`."""
    link: str | None = Field(default=None, pattern=r"^https://[^\s<>\"']{1,500}$")
    """Where the text of a licence that the hub does not list is found: https://... null: of those that it lists."""

    @model_validator(mode="after")
    def listed_or_with_its_link(self) -> NamedLicense:
        if self.link is None and self.name not in LICENSES:
            hint = f"Of another licence say where it is found: {{name: {self.name}, link: https://...}}."
            nearest = did_you_mean(self.name, sorted(LICENSES))
            raise ValueError(f"the hub lists no licence {self.name!r}. {nearest} {hint}")
        if self.link is not None and self.name in LICENSES:
            raise ValueError(f"the hub lists {self.name!r}, and links to it by itself. Remove link.")
        return self

    def metadata(self) -> dict[str, str]:
        """As a card's YAML says it."""
        if self.link is None:
            return {"license": self.name}
        return {"license": "other", "license_name": self.name, "license_link": self.link}


def by_name(value: Any) -> Any:
    """`apache-2.0` for `{name: apache-2.0}`."""
    return {"name": value} if isinstance(value, str) else value


License = Annotated[NamedLicense, BeforeValidator(by_name)]
"""A licence as a recipe gives it: `apache-2.0`, or `{name: my-license, link: https://...}`."""
