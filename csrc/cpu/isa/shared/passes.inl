// Rows of a product in passes of few. Included inside the unnamed namespace of one ISA file only.

/// fn(row, rows) for all rows in as few passes of at most kPassRows as possible, as even as
/// possible: 32 rows are 11 + 11 + 10.
template <int kPassRows, class Fn>
void for_passes(int rows, const Fn& fn) {
  int row = 0;
  for (int passes = (rows + kPassRows - 1) / kPassRows; passes > 0; --passes) {
    const int count = (rows - row + passes - 1) / passes;
    fn(row, count);
    row += count;
  }
}
