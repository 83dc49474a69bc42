/* Compiles an OpenVINO model for an Intel NPU on a machine that has none.
 *
 *     npu_compile.exe PLATFORM LIBS MODEL BLOB
 *
 * PLATFORM is one that the NPU's compiler knows ("4000"), LIBS the folder with OpenVINO's DLLs, MODEL an .xml file
 * with its .bin beside it, BLOB the file to write. Names hold no blanks and are relative to the current folder.
 *
 * A Windows program, because only OpenVINO's Windows package has that compiler; it runs under Wine. It needs nothing
 * but kernel32 (no C library), so that building it takes a tenth of a second. What it uses of OpenVINO's C API
 * (openvino/c/ov_core.h, ov_compiled_model.h; version 2026.4) is declared here by hand, and looked up by name.
 *
 * It prints lines "WORD text": "version ..." (of OpenVINO), "compiler ..." (NPU_COMPILER_VERSION: major << 16 | minor),
 * then "done", or "failed STEP: reason" with exit code 1; further lines of a reason follow as they are.
 */
typedef unsigned int u32;
typedef unsigned short wide;

#define IMPORT __declspec(dllimport)
IMPORT void *__stdcall GetStdHandle(u32);
IMPORT int __stdcall WriteFile(void *, const void *, u32, u32 *, void *);
IMPORT void __stdcall ExitProcess(u32);
IMPORT char *__stdcall GetCommandLineA(void);
IMPORT u32 __stdcall GetFullPathNameW(const wide *, u32, wide *, wide **);
IMPORT void *__stdcall LoadLibraryExW(const wide *, void *, u32);
IMPORT void *__stdcall GetProcAddress(void *, const char *);

#define STANDARD_OUTPUT ((u32)-11)
#define LOAD_WITH_ALTERED_SEARCH_PATH 8u /* what the DLL needs is looked for where the DLL is */
#define WORDS 4 /* the program's own name comes first, as a path that may hold blanks */
#define MAX_PATH_UNITS 4096

struct version { const char *build, *description; };
struct property { const char *key, *value; };

static void *library;

static u32 length(const char *text) {
    u32 count = 0;
    while (text[count]) count++;
    return count;
}

static void say(const char *text) {
    u32 written;
    WriteFile(GetStdHandle(STANDARD_OUTPUT), text, length(text), &written, 0);
}

static void line(const char *word, const char *text) {
    say(word);
    say(" ");
    say(text);
    say("\n");
}

static void fail(const char *step, const char *reason) {
    say("failed ");
    say(step);
    line(":", reason && *reason ? reason : "no reason given");
    ExitProcess(1);
}

static void *function(const char *name) {
    void *found = GetProcAddress(library, name);
    if (!found) fail("load", name);
    return found;
}

static void check(const char *step, int status) {
    const char *(*last)(void) = function("ov_get_last_err_msg");
    const char *(*general)(int) = function("ov_get_error_info");
    const char *reason;
    if (!status) return;
    reason = last();
    fail(step, reason && *reason ? reason : general(status));
}

/* The last WORDS words of a text, which it cuts up; gives how many there are. */
static int split(char *text, char **words) {
    int found = 0;
    char *at = text + length(text);
    while (at > text && found < WORDS) {
        while (at > text && at[-1] == ' ') *--at = 0;
        while (at > text && at[-1] != ' ') at--;
        if (*at) words[WORDS - ++found] = at;
    }
    return found;
}

static void load(const char *folder) {
    static wide relative[MAX_PATH_UNITS], absolute[MAX_PATH_UNITS];
    const char *file = "\\openvino_c.dll";
    u32 at = 0;
    while (*folder && at < 256) relative[at++] = (unsigned char)*folder++;
    while (*file) relative[at++] = (unsigned char)*file++;
    if (!GetFullPathNameW(relative, MAX_PATH_UNITS, absolute, 0)) fail("load", "the folder's path is too long");
    library = LoadLibraryExW(absolute, 0, LOAD_WITH_ALTERED_SEARCH_PATH);
    if (!library) fail("load", "openvino_c.dll, or a DLL that it needs, cannot be loaded");
}

static void compile(const char *platform, const char *model_path, const char *blob_path) {
    struct version version = {0, 0};
    struct property wanted[1];
    void *core = 0, *model = 0, *compiled = 0;
    char *compiler = 0;
    int (*get_version)(struct version *) = function("ov_get_openvino_version");
    int (*create)(void **) = function("ov_core_create");
    int (*get)(void *, const char *, const char *, char **) = function("ov_core_get_property");
    int (*read)(void *, const char *, const char *, void **) = function("ov_core_read_model");
    int (*build)(void *, void *, const char *, unsigned long long, struct property *, void **) =
        function("ov_core_compile_model_props");
    int (*export)(void *, const char *) = function("ov_compiled_model_export_model");

    wanted[0].key = "NPU_PLATFORM";
    wanted[0].value = platform;
    check("version", get_version(&version));
    line("version", version.build);
    check("start", create(&core));
    check("compiler", get(core, "NPU", "NPU_COMPILER_VERSION", &compiler));
    line("compiler", compiler);
    check("read", read(core, model_path, 0, &model));
    check("compile", build(core, model, "NPU", 1, wanted, &compiled));
    check("write", export(compiled, blob_path));
}

void start(void) {
    char *words[WORDS];
    if (split(GetCommandLineA(), words) != WORDS) fail("start", "expected PLATFORM LIBS MODEL BLOB");
    load(words[1]);
    compile(words[0], words[2], words[3]);
    say("done\n");
    ExitProcess(0); /* at once: unloading the compiler takes longer and gives nothing */
}
