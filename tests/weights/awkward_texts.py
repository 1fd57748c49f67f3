"""Texts that tokenizers treat differently if they are not the same."""

TEXTS = (
    '', ' ', '  leading', 'trailing  ', '\n', '\n\n\n', '\t\ttabs\t', 'a\r\nb',
    'x = {"k": [1, 2]}  # c', 'for (int i=0;i<n;++i) { a[i]+=1; }',
    '<b>bold</b><br/>', '<table><tr><td>x</td></tr></table>', '<unused3>',
    '<start_of_turn>user\nhi<end_of_turn>\n', '<mask>', '[multimodal]',
    '\U0001f600\U0001f680', '\U0001f468\u200d\U0001f469\u200d\U0001f467',
    '\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e',
    '\u4f60\u597d\uff0c\u4e16\u754c\u3002', '\u65e5\u672c\u8a9e\u306e\u6587',
    '\u041f\u0440\u0438\u0432\u0435\u0442', '\u0645\u0631\u062d\u0628\u0627',
    'caf\u00e9 cafe\u0301', 'na\u00efve \ufb01 \u00bd', '1234567890 3.14159',
    "don't can't I'll", '      six', 'a' * 40, 'x\u00a0y\u2003z', '\u2581low',
    'SELECT * FROM t WHERE a<>b;', '\x01\x7f', '\ud7ff\ue000\ufffd')
