/* Loops in C that the engine is measured against: one automaton over one stream.
 *
 * row        the current state's row in both tables: state number times letters (or words)
 * next_row   for each (state, letter), the row to go to
 * visits     for each (state, letter), how often it was taken; added to
 * returns    the row at the end, so that a stream can be walked in blocks
 */
#include <stddef.h>
#include <stdint.h>

/* The engine's loop: a letter is a whole round trip. */
int32_t walk_words(size_t n, const int32_t *restrict word, const int32_t *restrict next_row,
                   int64_t *restrict visits, int32_t row)
{
    for (size_t i = 0; i < n; i++) {
        size_t here = (size_t)row + (size_t)word[i];
        visits[here]++;
        row = next_row[here];
    }
    return row;
}

/* The plain one: a letter is an operation. */
int32_t walk_operations(size_t n, const uint16_t *restrict code, const int32_t *restrict next_row,
                        int64_t *restrict visits, int32_t row)
{
    for (size_t i = 0; i < n; i++) {
        size_t here = (size_t)row + code[i];
        visits[here]++;
        row = next_row[here];
    }
    return row;
}
