"""One Ray cluster for all tests of gangs: starting one takes longer than most of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import ray
from ray.cluster_utils import Cluster

from moe_evo.gangs.connection import NAMESPACE


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A head node with room for many small gangs, which this process is connected to; tests may add nodes."""
    head = {"num_cpus": 16, "include_dashboard": False, "_system_config": {"metrics_report_interval_ms": 1000}}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(cluster.address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
