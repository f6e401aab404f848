"""Multi-coil MRI from seeds alone: phantoms, coil sensitivities, sampling masks and the acquisition that joins them.

Images are (rows, columns); k-space is in the order of `np.fft`, zero frequency first (`np.fft.fftshift` shows it as usual).
"""
