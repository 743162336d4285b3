"""What can be chosen, and what is asked and told about it. Pure: no torch, no Ray, no Arrow."""

from dtmsearch.core import built_in_schemes as built_in_schemes  # whose families are known from here on
