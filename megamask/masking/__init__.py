"""A mask is three answers: how many (a schedule), in which pieces (a unit), which first (a score).

Every unit goes with every score and every schedule. Nothing here knows that models exist: entropy arrives
as a tensor of one number per row.
"""
