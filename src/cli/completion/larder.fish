# fish completion for larder. It asks the program, so that it need not be installed anew with a new version.
function __larder_complete
    set -l words (commandline -opc) (commandline -ct)
    set -l found ($words[1] complete-words -- $words[2..-1] 2>/dev/null)
    if test (count $found) -gt 0
        printf '%s\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c larder -f -a '(__larder_complete)'
