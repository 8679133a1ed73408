"""The HDF5 layout of protein structures: foldtree2's, with its defects repaired. Who writes and who reads share it.

    /structs/<identifier>/node/<type>/x                          the node types below
    /structs/<identifier>/edge/<source>_<link>_<target>/edge_index (2, E) int64, edge_attr (E,) float32
    /index/identifier (N,) string, /index/residues (N,) int32    so that nobody opens N groups to learn N lengths
    attributes of the root: layout, version, amino_acids

L residues:

    res            (L, F)     what the encoder reads: sine and cosine of phi, psi, omega (zeros where one is not
                              defined), because angles jump at π, near which omega lies; amino-acid properties if there
                              are; one-hot amino acid; the absolute frame (9) and step (3) only where asked for
    AA             (L, 20)    one-hot amino acid, in the order of AMINO_ACIDS; a row of zeros is an unknown one
    coords         (L, 3)     CA, Å
    R_true         (L, 3, 3)  frame: columns x = C - CA, y = N - CA made orthogonal to x, z = x × y, normalised
    t_true         (L, 3)     CA of the next residue - CA, Å; last row 0
    bondangles     (L, 3)     phi, psi, omega, radians; 0 where one is not defined
    plddt          (L, 1)     confidence, 0..1; 1 for experimental structures
    positions      (L, 256)   positional encoding with base 10
    fourier1dr/di  (L, 80)    magnitude and phase of the FFT along the rows of the CA distance matrix
    fourier2dr/di  (1, 1300)  magnitude and phase of its two-dimensional FFT, four corner triangles of side 25
    ss             (L, 3)     one-hot loop, helix, strand (DSSP)
    godnode, godnode4decoder  (1, 5)  ones
    Foldx          (23,)      energies; optional

Edges between residues: backbone (i -> i - 1), backbonerev (i -> i + 1), contactPoints (CA closer than 8 Å; both
directions; edge_attr is the distance), hbond (DSSP; both directions), window, windowrev (within two residues).
"""

from __future__ import annotations

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
SECONDARY = ("loop", "helix", "strand")
CONTACT_DISTANCE = 8.0
"""CA-CA, Å, below which two residues are in contact."""
SPECTRUM_WIDTH = 80
"""Frequencies kept of each row's one-dimensional FFT."""
TRIANGLE = 25
"""Side of the corner triangles of the two-dimensional FFT."""
SPECTRUM_2D_WIDTH = 4 * TRIANGLE * (TRIANGLE + 1) // 2
"""1300: values of the four corner triangles."""
POSITION_WIDTH, POSITION_BASE = 256, 10.0
FOLDX_WIDTH = 23
LAYOUT, VERSION = "foldtree2-aligned", 1
"""Attributes `layout` and `version` of the root of a file that `gdyn prepare proteins` wrote."""
