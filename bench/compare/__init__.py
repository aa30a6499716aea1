"""The comparison with other NBD servers, which bench/peers.py runs.

servers    what is compared: how each is started, reached, ended, and what CPU it used
limits     the memory that each may use
workloads  what is asked of them, in which surroundings, and which of it a profile runs
clients    what asks: `fdb-nbd bench`, fio, and a bare loop on the disk
turns      the order in which all of this is measured
results    what was measured: kept as JSON, medians, ratios, targets
report     tables and charts from it
"""
