// SPDX-License-Identifier: Apache-2.0
//
// What the launcher says by itself: which versions there are, and why something failed.
#ifndef PODLANE_ANSWER_H
#define PODLANE_ANSWER_H

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <wchar.h>

enum error_code { // cni:SPEC.md section 5
    INVALID_ENVIRONMENT = 4,
    IO_FAILURE = 5,
    TRY_AGAIN_LATER = 11,
    PLUGIN_NOT_AVAILABLE = 50,
};

enum { TEXT_SIZE = 1024 }; // of an error message; longer ones are cut

// Those of cni/versions.py.
static const char *const versions[] = {"0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"};
enum { VERSION_COUNT = sizeof(versions) / sizeof(versions[0]) };

static void print_versions(FILE *out, const char *quote, const char *separator)
{
    for (int i = 0; i < VERSION_COUNT; i++)
        fprintf(out, "%s%s%s%s", i ? separator : "", quote, versions[i], quote);
}

static void print_json_string(const char *text)
{
    mbstate_t state = {0};
    wchar_t character;
    putchar('"');
    for (size_t left = strlen(text), size; left > 0; text += size, left -= size) {
        size = mbrtowc(&character, text, left, &state);
        if (size > left) { // not UTF-8
            fputs("\\ufffd", stdout);
            state = (mbstate_t){0};
            size = 1;
        } else if (character < ' ' || character == '"' || character == '\\') {
            printf("\\u%04x", (unsigned)character);
        } else {
            fwrite(text, 1, size, stdout);
        }
    }
    putchar('"');
}

__attribute__((noreturn, format(printf, 3, 4))) static void fail(enum error_code code, const char *details,
                                                                 const char *format, ...)
{
    char text[TEXT_SIZE];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    printf("{\"cniVersion\":\"%s\",\"code\":%d,\"msg\":", versions[VERSION_COUNT - 1], code);
    print_json_string(text);
    fputs(",\"details\":", stdout);
    print_json_string(details);
    puts("}");
    exit(EXIT_FAILURE); // flushes
}

// In place of strerror: runtimes take a DEL's "No such file or directory" or "not found" for success
// (containerd's go-cni).
static const char *reason(int error)
{
    switch (error) {
    case ENOENT:
        return "it does not exist";
    case ECONNREFUSED:
        return "nobody listens there";
    case ETIMEDOUT:
        return "the deadline passed (PODLANE_TIMEOUT_MS sets another)";
    default:
        return strerror(error);
    }
}

static int print_about(void)
{
    fputs("podlane, an eBPF-accelerated CNI plugin for Kubernetes\nCNI protocol versions supported: ", stderr);
    print_versions(stderr, "", ", ");
    fputs("\n", stderr);
    return EXIT_SUCCESS;
}

static int print_version(void)
{
    printf("{\"cniVersion\":\"%s\",\"supportedVersions\":[", versions[VERSION_COUNT - 1]);
    print_versions(stdout, "\"", ",");
    puts("]}");
    return fflush(stdout) == 0 && !ferror(stdout) ? EXIT_SUCCESS : EXIT_FAILURE;
}

#endif
