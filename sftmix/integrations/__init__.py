"""SFTMix inside other trainers: `trl` and `axolotl`. Each needs the package it is named after."""
