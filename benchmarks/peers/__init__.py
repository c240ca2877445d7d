"""What ``benchmarks/compare.py`` runs: the contenders, the workers that hold them, and the driver of the rounds.

============== ========================================================================================
file           what it is
============== ========================================================================================
work.py        the shapes, the weights and inputs, how many operations the matrix products of each take
contenders.py  which contenders there are, and with which environment each of them runs
worker.py      the process that holds one contender and does what it reads from its standard input
driver.py      starts workers, checks their results, lets them take turns
run.py         the settings of a run, and what it finds
suites.py      the suites that let contenders take turns; fresh.py those that need a new process for every figure
report.py      tables, and what the figures depend on; figure.py the plot
ours.py        this library; ours_cells.py the cells that a user would type
torch_peer.py, jax_peer.py, numpy_peer.py, autograd_peer.py, onnx_peer.py   the peers
peak.py        the fastest matrix product that this machine is seen to do
============== ========================================================================================
"""
