"""Fixtures of the local tests."""

from support.local_fixtures import (
    authentik as authentik,
)
from support.local_fixtures import (
    control as control,
)
from support.local_fixtures import (
    dagster_dev as dagster_dev,
)
from support.local_fixtures import (
    whole_example as whole_example,
)
