"""Fixtures of the cluster tests."""

from support.cluster_fixtures import (
    client as client,
)
from support.cluster_fixtures import (
    client_home as client_home,
)
from support.cluster_fixtures import (
    on_supercomputer as on_supercomputer,
)
from support.cluster_fixtures import (
    shells_that_end_at_once as shells_that_end_at_once,
)
from support.cluster_fixtures import (
    variables as variables,
)
from support.cluster_fixtures import (
    without_secret as without_secret,
)
from support.cluster_fixtures import (
    workloads as workloads,
)
