"""What only a borrowed GPU machine needs: wheels, parcels, time slices."""
