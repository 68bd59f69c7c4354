/* One automaton over one stream: the loop that the engine is measured against.
 *
 * row        the current state's row in both tables: state number times alphabet size
 * next_row   for each (state, letter), the row to go to
 * visits     for each (state, letter), how often it was taken; added to
 * returns    the row at the end, so that a stream can be walked in blocks
 */
#include <stddef.h>
#include <stdint.h>

int32_t walk(size_t n, const uint16_t *restrict code, const int32_t *restrict next_row,
             int64_t *restrict visits, int32_t row)
{
    for (size_t i = 0; i < n; i++) {
        size_t idx = (size_t)row + code[i];
        visits[idx]++;
        row = next_row[idx];
    }
    return row;
}
