"""What things cost, side by side in one run: `scripts/bench [kernel | kubernetes]`.

`postgres` (the one without a word) is the data path of SQL; `kernel` is what hooks and rules cost those who connect and
start processes; `kubernetes` is the data path of an API server. All compare with the same thing without Hopgate, in
turn, in several rounds whose order rotates, and print medians and ratios; every sample is in a JSON file. There is no
pass mark.
"""
