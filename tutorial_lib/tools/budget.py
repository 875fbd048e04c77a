# Exported from chapters/part_0_foundations/0_1_pipeline_overview.ipynb.
# Edit the lesson, then run: make export
"""From parameters and tokens to FLOPs, and from FLOPs to time, energy and money."""

__all__ = ["six_nd", "training_cost"]


def six_nd(n_params: float, n_tokens: float) -> float:
    """Training FLOPs by the rule of thumb 6·N·D: 2 for each parameter and token forward, 4 backward.

    From Kaplan et al. 2020, section 2.1. It leaves out attention's scores and counts tables as if they were
    multiplied by: `flops_per_token` does neither.
    """
    return 6 * n_params * n_tokens


def training_cost(
    flops: float,
    flops_per_second_of_chip: float,
    utilization: float,
    watts_per_chip: float,
    price_per_chip_hour: float,
    chips: int = 1,
    overhead: float = 1.0,
) -> dict[str, float]:
    """Time, energy and money for so many FLOPs: `chip_hours`, `hours`, `kilowatt_hours`, `money`.

    Args:
        flops: All of them, say from `six_nd`.
        flops_per_second_of_chip: The data sheet's peak, for the number format in use and without sparsity.
        utilization: The share of the peak that is reached, between 0 and 1.
        watts_per_chip: What a chip draws.
        price_per_chip_hour: In any currency; `money` is in the same.
        chips: How many work side by side. Twice as many take half the `hours` and as many `chip_hours`.
        overhead: The building's energy for each unit that reaches the chips (its "PUE"), 1.1 or so.

    Raises:
        ValueError: if the utilization is no fraction.
    """
    if not 0 < utilization <= 1:
        raise ValueError(f"utilization is {utilization}: give a fraction, 0.4 for 40 percent")
    chip_hours = flops / (flops_per_second_of_chip * utilization) / 3600
    return {
        "chip_hours": chip_hours,
        "hours": chip_hours / chips,
        "kilowatt_hours": chip_hours * watts_per_chip / 1000 * overhead,
        "money": chip_hours * price_per_chip_hour,
    }
