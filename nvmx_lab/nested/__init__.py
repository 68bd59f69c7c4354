"""L0's nested VMX: the model, sync policies, KVM releases and the automaton."""
