/* Sizes as people write and read them. Fractions are computed in integers: 1.1T must be
 * the same number of bytes everywhere. */
#include "base/size.h"

#include <stddef.h>
#include <stdio.h>
#include <string.h>

#define FRACTION_DIGITS_MAX 9

__extension__ typedef unsigned __int128 u128;

static bool is_digit(char c)
{
    return c >= '0' && c <= '9';
}

/* Reads a unit ("", "B", "K", "KB", "KiB", ... in either case) that ends the text. */
static bool parse_unit(const char *text, unsigned *shift)
{
    static const char letters[] = "KMGTPE";
    *shift = 0;
    if (*text) {
        char upper = *text >= 'a' && *text <= 'z' ? (char)(*text - 'a' + 'A') : *text;
        const char *at = strchr(letters, upper);
        if (at) {
            *shift = 10 * (unsigned)(at - letters + 1);
            text++;
            if (*text == 'i' && (text[1] == 'B' || text[1] == 'b'))
                text++;
        }
    }
    if (*text == 'B' || *text == 'b')
        text++;
    return *text == '\0';
}

bool size_parse(const char *text, uint64_t *bytes)
{
    uint64_t whole = 0;
    if (!is_digit(*text))
        return false;
    for (; is_digit(*text); text++) {
        uint64_t digit = (uint64_t)(*text - '0');
        if (whole > (INT64_MAX - digit) / 10)
            return false;
        whole = whole * 10 + digit;
    }

    uint64_t fraction = 0, scale = 1;
    bool has_fraction = *text == '.';
    if (has_fraction) {
        text++;
        if (!is_digit(*text))
            return false;
        unsigned digits = 0;
        for (; is_digit(*text); text++) {
            if (++digits > FRACTION_DIGITS_MAX)
                return false;
            fraction = fraction * 10 + (uint64_t)(*text - '0');
            scale *= 10;
        }
    }

    unsigned shift;
    if (!parse_unit(text, &shift))
        return false;
    if (has_fraction && shift == 0)
        return false;
    if (whole > (uint64_t)INT64_MAX >> shift)
        return false;

    /* fraction < scale, so the product below needs 64 bits for the unit and 30 for the
     * fraction. */
    u128 part = ((u128)fraction << shift) / scale;
    uint64_t total = (whole << shift) + (uint64_t)part;
    if (total > (uint64_t)INT64_MAX)
        return false;
    *bytes = total;
    return true;
}

const char *size_format(uint64_t bytes, char out[24])
{
    static const char letters[] = "KMGTPE";
    if (bytes < 1024) {
        snprintf(out, 24, "%u B", (unsigned)bytes);
        return out;
    }
    unsigned unit = 0;
    while (unit < 5 && bytes >> (10 * (unit + 2)))
        unit++;
    unsigned shift = 10 * (unit + 1);
    uint64_t whole = bytes >> shift;
    uint64_t rest = bytes & (((uint64_t)1 << shift) - 1);
    /* One decimal, rounded down: a size is never shown larger than it is. */
    unsigned tenth = (unsigned)(((u128)rest * 10) >> shift);
    snprintf(out, 24, "%u.%u %ciB", (unsigned)whole, tenth, letters[unit]);
    return out;
}
