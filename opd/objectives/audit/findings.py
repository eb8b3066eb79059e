"""Faults, warnings, caveats and evidence, as an audit collects them."""

from dataclasses import dataclass, field


@dataclass
class Findings:
    """What has been found so far."""

    faults: list[str] = field(default_factory=list)
    """Codes of `opd.objectives.audit.card.FAULTS`."""
    warnings: list[str] = field(default_factory=list)
    """Codes of `opd.objectives.audit.card.WARNINGS`."""
    caveats: list[str] = field(default_factory=list)
    """Codes of `opd.objectives.audit.card.CAVEATS`."""
    evidence: dict[str, str] = field(default_factory=dict)
    """Code or remark -> what decided it."""

    def fault(self, code: str, evidence: str | None) -> None:
        """Add a fault, unless there is no evidence."""
        if evidence is not None:
            self.faults.append(code)
            self.evidence[code] = evidence

    def warning(self, code: str, evidence: str) -> None:
        """Add a warning."""
        self.warnings.append(code)
        self.evidence[code] = evidence
