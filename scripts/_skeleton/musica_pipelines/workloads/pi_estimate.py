"""Estimate pi from random points."""

import math
import random

from dagster_pipes import open_dagster_pipes

SEED = 20130101


def estimate(points: int) -> tuple[float, float]:
    """Pi and its standard error, from so many points."""
    source = random.Random(SEED)
    inside = sum(source.random() ** 2 + source.random() ** 2 < 1 for _ in range(points))
    share = inside / points
    return 4 * share, 4 * math.sqrt(share * (1 - share) / points)


def main() -> None:
    with open_dagster_pipes() as pipes:
        points = pipes.get_extra("points")
        value, error = estimate(points)
        pipes.log.info(f"{value:.4f} from {points} points")
        pipes.report_asset_check("near_pi", abs(value - math.pi) < 3 * error, metadata={"standard_error": error})
        pipes.report_asset_materialization(metadata={"pi": value, "points": points})


if __name__ == "__main__":
    main()
