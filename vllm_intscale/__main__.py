"""`python -m vllm_intscale`: the `intscale` command."""

from vllm_intscale.cli import main

main()
