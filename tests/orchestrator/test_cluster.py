"""A local cluster offers what every role of the table asks for."""

from __future__ import annotations

from orchestrator.cluster import MAX_LOCAL_ACTORS, _custom
from orchestrator.config.schema import ClusterConfig
from orchestrator.roles.table import ROLES


def test_custom_resources_of_every_role_are_offered_to_as_many_actors_as_may_share_the_machine() -> None:
    config = ClusterConfig.model_validate({role.name: {"custom": {role.name: 1.0, "shared": 0.5}} for role in ROLES})
    assert _custom(config) == dict.fromkeys((role.name for role in ROLES), 1.0 * MAX_LOCAL_ACTORS) | {
        "shared": 0.5 * MAX_LOCAL_ACTORS * len(ROLES)
    }
    assert _custom(ClusterConfig()) == {}
