"""Model directories read and written tile by tile: conversion to smaller formats, layouts that others load, audit."""
