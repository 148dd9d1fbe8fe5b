"""A Ray cluster of two nodes on loopback: prints its address, loses its second node at a line, ends with its input."""

import os
import sys

# Ray would use the node's own address instead of loopback.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

from ray.cluster_utils import Cluster


def main() -> None:
    cluster = Cluster()
    node = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 * 2**20}
    cluster.add_node(**node, node_ip_address="127.0.0.1")
    second = cluster.add_node(**node, node_ip_address="127.0.0.1")
    print(cluster.address, flush=True)
    if sys.stdin.readline():
        cluster.remove_node(second, allow_graceful=False)
        print("removed", flush=True)
        sys.stdin.readline()
    cluster.shutdown()


if __name__ == "__main__":
    main()
