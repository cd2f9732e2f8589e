"""The search: Ax proposes, trials answer, the state is saved after each."""
