"""The page that says what was fitted: laws beside the paper's, how far to trust them, what the data do not support."""

from __future__ import annotations

from collections.abc import Sequence

from mmtrain.log.console import count_text
from mmtrain.scaling.compute import ComputeLaws
from mmtrain.scaling.fit import ArchitectureFit
from mmtrain.scaling.paper import PFLOP_S_DAY, TABLE_2, PaperLaw
from mmtrain.scaling.power import Interval, PowerFit
from mmtrain.scaling.surface import CHINCHILLA, SurfaceFit, percentiles
from mmtrain.scaling.tables import Block, Table, Title

UNITS = (
    "Loss in nats a token, N activated parameters without embeddings, D tokens. Laws over compute take C in "
    "PFLOP/s-days (8.64e19 FLOP). In brackets 95% intervals of the laws, to which a run adds its scatter: Student's of "
    "a power law, a bootstrap over runs of L(N, D)."
)


def blocks_of(fits: Sequence[ArchitectureFit]) -> list[Block]:
    """Return the page of all architectures."""
    blocks: list[Block] = [UNITS]
    for fit in fits:
        blocks += [Title(fit.label), _extent(fit)]
        for part in (_compute, _surfaces, _held_out, _predictions, _batches, _rates):
            blocks += part(fit)
        if fit.doubts:
            blocks.append("Doubtful:\n" + "\n".join(f"- {doubt}" for doubt in fit.doubts))
        if fit.refused:
            blocks.append("Not fitted:\n" + "\n".join(f"- {reason}" for reason in fit.refused))
    return blocks


def _extent(fit: ArchitectureFit) -> str:
    runs, sizes = len({point.run for point in fit.points}), [point.activated for point in fit.points]
    computes = [point.flops for point in fit.points]
    return (
        f"{len(fit.points)} points of {runs} runs, {len(fit.ends)} of them at a run's end; {len(set(sizes))} sizes, "
        f"{count_text(min(sizes))} to {count_text(max(sizes))}; {min(computes):.2e} to {max(computes):.2e} FLOP."
    )


def _compute(fit: ArchitectureFit) -> list[Block]:
    rows = []
    named = (("frontier", fit.frontier_laws, "points"), ("isoFLOP minima", fit.isoflop_laws, "groups"))
    for name, laws, what in named:
        if laws:
            cells = [_power(law) for law in (laws.loss, laws.parameters, laws.tokens)]
            rows.append([f"{name}, {laws.loss.points} {what}", *cells])
    if not rows:
        return []
    if paper := TABLE_2.get(fit.architecture):
        rows.append([_source(fit), *(_printed(law) for law in (paper.loss, paper.parameters, paper.tokens))])
    why_not = [laws.why_not + "." for laws in (fit.frontier_laws,) if laws and laws.why_not]
    return [Table(["fitted through", "L(C)", "N_opt(C)", "D_opt(C)"], rows), *why_not, *_scatter(fit.frontier_laws)]


def _source(fit: ArchitectureFit) -> str:
    """Name the paper's table; Table 1 counts its models as dense."""
    return "MiniMax-01 Table 2" + (" (dense)" if fit.experts else "")


def _scatter(laws: ComputeLaws | None) -> list[Block]:
    return [f"The frontier's points lie {laws.loss.scatter:.2%} about its L(C)."] if laws else []


def _power(law: PowerFit | None) -> str:
    return f"{law.beta.value:.4g} C^{law.alpha.text('.4f')}" if law else "-"


def _printed(law: PaperLaw) -> str:
    return f"{law.beta:.4g} C^{law.alpha:.4f}"


def _surfaces(fit: ArchitectureFit) -> list[Block]:
    blocks: list[Block] = []
    for law in (fit.surface, fit.mixture):
        if law:
            rows = [[name, value.text()] for name, value in law.coefficients.items()]
            rows += [["N_opt exponent", _split_exponent(law).text()]] if law.law is CHINCHILLA else []
            blocks += [
                f"{law.law.form}: residuals {law.scatter:.2%} (root mean square) over {len(law.residuals)} points; "
                f"{law.agreeing:.0%} of the best eighth of {law.starts} starts came to this optimum.",
                Table(["coefficient", "value"], rows),
            ]
    return blocks


def _split_exponent(law: SurfaceFit) -> Interval:
    """Return beta/(alpha + beta), the exponent of N_opt where a parameter and token cost the same at every size."""
    alpha, beta = law.theta_Sp[:, 2], law.theta_Sp[:, 4]
    return percentiles(beta / (alpha + beta))


def _held_out(fit: ArchitectureFit) -> list[Block]:
    if not fit.held_out:
        return []
    head = ["fitted without it", "N", "FLOP", "measured", "predicted", "error"]
    rows = [
        [one.method, count_text(one.parameters), f"{one.flops:.2e}", f"{one.measured:.4f}", one.predicted.text(".5g"),
         f"{one.error:+.2%}"]
        for one in fit.held_out
    ]  # fmt: skip
    return ["Held out, the largest size or isoFLOP group:", Table(head, rows)]


def _predictions(fit: ArchitectureFit) -> list[Block]:
    if not fit.predictions:
        return []
    first = fit.predictions[0]
    rows = [[one.method, one.loss.text(), _count(one.parameters), _count(one.tokens)] for one in fit.predictions]
    if paper := TABLE_2.get(fit.architecture):
        laws = [law.at(first.flops) for law in (paper.loss, paper.parameters, paper.tokens)]
        rows.append([_source(fit), f"{laws[0]:.4g}", count_text(laws[1]), count_text(laws[2])])
    where = f"{first.flops:.3g} FLOP ({first.flops / PFLOP_S_DAY:.3g} PFLOP/s-days)"
    return [f"Predicted at {where}, {first.beyond:.3g} times the data's most:", Table(["by", "loss", "N", "D"], rows)]


def _count(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    return f"{count_text(interval.value)} [{count_text(interval.low)}, {count_text(interval.high)}]"


def _batches(fit: ArchitectureFit) -> list[Block]:
    if not fit.batch_law:
        return []
    law = fit.batch_law
    text = (
        f"Critical batch: B_crit = {law.beta.value:.3g} L^{law.alpha.text('.3g')} tokens, measured at {law.points} "
        f"losses from {law.low_x:.3f} to {law.high_x:.3f}."
    )
    if not fit.ramp or not fit.ramp_for:
        return [text]
    rows = [
        [count_text(step.batch_tokens), "start" if not step.tokens else f"{step.loss:.3f}", count_text(step.tokens)]
        for step in fit.ramp
    ]
    size, tokens = map(count_text, fit.ramp_for)
    return [
        f"{text} For {size} parameters and {tokens} tokens:",
        Table(["batch, tokens", "from loss", "from token"], rows),
    ]


def _rates(fit: ArchitectureFit) -> list[Block]:
    if not fit.rates:
        return []
    rows = [[count_text(one.parameters), f"{one.rate:.3g}", f"{one.loss:.4f}", str(one.tried)] for one in fit.rates]
    table = Table(["N", "best learning rate", "loss", "tried"], rows)
    if not fit.rate_law:
        return [table]
    law = fit.rate_law
    return [table, f"lr(N) = {law.beta.value:.3g} N^{law.alpha.text('.3g')}."]
