"""Proof that nothing is lost: power losses enumerated, faults planted, bits rotted;
docs/reliability.md says what each shows.
"""
